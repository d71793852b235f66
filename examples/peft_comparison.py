"""PEFT and lorakit under the same Trainer of transformers: one model, the same rows, batches, rank, start and steps.

Both begin with the same A (lorakit's, given to PEFT) and B = 0, so their losses differ by rounding alone. They take
their steps in turns, in one process, so that whatever else the machine does meets both. A step's time is from the end
of one to the end of the next: data, forward, backward, clipping, AdamW, and all else that the Trainer does.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Semaphore

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.trainer import Trainer, TrainerCallback, TrainingArguments

import lorakit as lk

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Turns(TrainerCallback):
    """Lets one trainer go on until its next step is done, then the other; and times the steps."""

    def __init__(self, mine: Semaphore, other: Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []

    def on_train_begin(self, *args: object, **more: object) -> None:
        """Wait for the turn."""
        assert self.mine.acquire(timeout=600), "the other trainer has stopped"
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **more: object) -> None:
        """Give the turn away, and wait for it."""
        self.seconds.append(time.perf_counter() - self.began)
        self.other.release()
        self.on_train_begin()

    def on_train_end(self, *args: object, **more: object) -> None:
        """Let the other finish."""
        self.other.release()


def build(where: str | None) -> PreTrainedModel:
    """The model in a directory, or a small Llama of random weights that reads bytes."""
    if where:
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.05, **size))


def read(where: str | None, count: int, length: int) -> Tensor:
    """Rows of tokens (count, length), from the sources of Python's standard library."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(Path(os.__file__).parent.glob("*.py")))
    if where is None:
        return torch.tensor(list(text[: count * length].encode()[: count * length])).view(count, length)
    tokens = AutoTokenizer.from_pretrained(where)(text[: 16 * count * length], return_tensors="pt").input_ids[0]
    return tokens[: count * length].view(count, length)


def train(models: list[nn.Module], rows: Tensor, seed: int, args: argparse.Namespace, folder: str) -> list[list[float]]:
    """The loss of each model on 16 rows held out, and the seconds of its steps."""
    examples = [{"input_ids": row, "labels": row} for row in rows]
    arguments = {"max_steps": args.steps, "per_device_train_batch_size": args.batch, "learning_rate": args.lr}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    turns = Semaphore(1), Semaphore(0)
    callbacks = Turns(*turns), Turns(*turns[::-1])
    trainers = [
        Trainer(
            model,
            TrainingArguments(folder, seed=seed, data_seed=seed, warmup_steps=0.05, **arguments, **quiet),
            train_dataset=examples[16:],
            callbacks=[callback],
        )
        for model, callback in zip(models, callbacks, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trainer: trainer.train(), trainers))
    losses = [trainer.evaluate(examples[:16])["eval_loss"] for trainer in trainers]
    return [[loss, *callback.seconds] for loss, callback in zip(losses, callbacks, strict=True)]


def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Llama or its like, with its tokenizer; by default a small one built here")
    for name, value in {"seeds": 3, "steps": 60, "rank": 16, "batch": 4, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"by default {value}")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    rows = read(args.model, 16 + args.steps * args.batch, args.length)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    for seed in range(args.seeds):
        ours, theirs = build(args.model), get_peft_model(build(args.model), config)
        torch.manual_seed(seed)
        lk.attach(ours, lk.LoRA(rank=args.rank), LAYERS)
        set_peft_model_state_dict(theirs, lk.adapter_state_dict(ours))
        with tempfile.TemporaryDirectory() as folder:
            (loss, *mine), (its_loss, *its) = train([ours, theirs], rows, seed, args, folder)
        trained = get_peft_model_state_dict(theirs)
        apart = max((trained[key] - tensor).abs().max() for key, tensor in lk.adapter_state_dict(ours).items())
        ratio = median(b / a for a, b in zip(mine[5:], its[5:], strict=True))
        speeds = [args.batch * args.length / median(seconds[5:]) for seconds in (mine, its)]
        print(f"seed {seed}: final loss of lorakit {loss:.6f}, of PEFT {its_loss:.6f}; adapters differ by {apart:.1e}")
        print(f"        tokens/s of lorakit {speeds[0]:,.0f}, of PEFT {speeds[1]:,.0f}; step by step {ratio:.3f} to 1")


if __name__ == "__main__":
    main()
