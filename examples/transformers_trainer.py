"""transformers' own Trainer on a model adapted in place: no wrapper, no subclass, no callback.

Its checkpoints hold the adapter, not the base, and a run continued from one ends in the same bits.
"""

import argparse
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the checkpoints")
out = Path(parser.parse_args().out or tempfile.mkdtemp())

data = torch.tensor(list(Path(textwrap.__file__).read_bytes()))  # a token for each byte
rows = [{"input_ids": row, "labels": row} for row in data[: len(data) // 128 * 128].view(-1, 128)]


def trainer_for(folder: Path) -> Trainer:
    """The same each time."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    model._keys_to_ignore_on_save = list(model.state_dict())  # checkpoints leave out the base, and keep
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # the model's own names
    lk.attach(model, lk.LoRA(rank=8, dropout=0.1), name="python")
    steps = {"max_steps": 40, "save_steps": 20, "eval_steps": 20, "logging_steps": 20, "eval_strategy": "steps"}
    quiet = {"disable_tqdm": True, "report_to": "none"}
    arguments = TrainingArguments(str(folder), learning_rate=5e-3, use_cpu=True, **steps, **quiet)
    return Trainer(model, arguments, train_dataset=rows[8:], eval_dataset=rows[:8])


whole, continued = trainer_for(out / "whole"), trainer_for(out / "continued")
before = whole.evaluate()["eval_loss"]
whole.train()
after = whole.evaluate()["eval_loss"]
continued.train(resume_from_checkpoint=out / "whole" / "checkpoint-20")
lk.save(whole.model, out / "python")  # the adapter alone, to use or to share

size = (out / "whole" / "checkpoint-40" / "model.safetensors").stat().st_size
base = sum(p.nbytes for p in whole.model.parameters() if not p.requires_grad)
print(f"loss on text held out: {before:.3f} before, {after:.3f} after")
print(f"the weights of a checkpoint: {size:,} bytes; those of the base: {base:,}")
pairs = zip(lk.adapter_parameters(whole.model), lk.adapter_parameters(continued.model), strict=True)
assert all(torch.equal(a, b) for a, b in pairs)
assert after < before and size < base / 5
