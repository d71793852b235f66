"""TRL's SFTTrainer on a model adapted in place, with the loss on the completions only.

A small Llama learns to spell digits from pairs of `prompt` and `completion`, and then generates them.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the adapter")
out = Path(parser.parse_args().out or tempfile.mkdtemp())

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
bytewise = Tokenizer(models.BPE(vocab=letters, merges=[]))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<pad>")

torch.manual_seed(0)
size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **size))
lk.attach(model, lk.LoRA(rank=8), exclude="lm_head", name="digits")  # whose weight TRL reads, past its call

words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
pairs = [{"prompt": f"{digit} is ", "completion": word} for digit, word in enumerate(words)]
settings = {"max_steps": 60, "per_device_train_batch_size": 10, "learning_rate": 5e-3, "completion_only_loss": True}
quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10}
config = SFTConfig(str(out), **settings, **quiet, bf16=False, use_cpu=True)
trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
for labels in next(iter(trainer.get_train_dataloader()))["labels"]:
    assert tokenizer.decode(labels[labels != -100]).removesuffix("<end>") in words  # no prompt is trained
trainer.train()
lk.save(model, out / "digits")

losses = [f"{entry['loss']:.3f}" for entry in trainer.state.log_history if "loss" in entry]
print("loss on the completions, every ten steps:", *losses)
model.eval()
for pair in pairs:
    prompt = tokenizer(pair["prompt"], return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    print(answer)
    assert answer == pair["prompt"] + pair["completion"] + "<end>"
