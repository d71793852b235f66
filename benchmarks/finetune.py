"""What `lorakit train` costs beside a loop written by hand, and beside PEFT under transformers' Trainer.

    python -m benchmarks.finetune                     # a Llama of 2.2 million numbers, made here
    python -m benchmarks.finetune --model DIR         # another one

One thread. Every arm trains an adapter of the same rank on the same layers and batches from the same A, with fused
AdamW, clipping at 1 and a cosine: what differs is the code around. The arms take turns in one process; of each round
the CPU time of a step is taken between the fifth step and the last. After the table of costs comes one of quality: the
validation loss after the last step, for three seeds.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup, set_seed

import lorakit as lk
from lorakit.finetune.base import Base, open_base
from lorakit.finetune.config import checked
from lorakit.finetune.data import collate
from lorakit.finetune.quiet import quiet_imports
from lorakit.finetune.training.directory import begin, open_directory
from lorakit.finetune.training.engine import Examples, build
from lorakit.finetune.training.preparation import encode_data, prepare, read_data
from lorakit.finetune.training.progress import Line
from lorakit.finetune.training.stopping import Stopper
from lorakit.finetune.training.trainer import row_losses

BATCH, RANK, RATE, WARM = 8, 16, 1e-3, 5
SKIPPED = 5
"""Steps before the clock starts."""


class Clock(TrainerCallback):
    """CPU seconds after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())

    def each(self) -> float:
        return (self.times[-1] - self.times[SKIPPED - 1]) / (len(self.times) - SKIPPED)


def write_data(path: Path, rows: int = 600) -> Path:
    """Questions in words and their sums: short examples of about thirty tokens."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    choose = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            digits = [choose.randrange(10) for _ in range(choose.randrange(3, 9))]
            asked = " and ".join(names[digit] for digit in digits)
            out.write(json.dumps({"prompt": f"Add {asked}: ", "completion": f"the sum is {sum(digits)}."}) + "\n")
    return path


def write_model(folder: Path) -> Path:
    """A Llama of 2.2 million numbers with a tokenizer of bytes, at random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    plain = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Bench:
    """The arms over one model and one file."""

    def __init__(self, model: Path, data: Path, steps: int, folder: Path) -> None:
        self.model, self.data, self.steps, self.folder = str(model), str(data), steps, folder

    def settings(self, seed: int, out: str) -> Any:
        return checked(
            {
                "model": self.model, "data": self.data, "out": str(self.folder / out), "overwrite": True,
                "steps": self.steps, "batch_size": BATCH, "rank": RANK, "learning_rate": RATE, "warmup": WARM,
                "seed": seed,
                "eval_every": 10**6, "samples": 0, "max_length": 256, "result": "last", "device": "cpu",
            },
            "bench",
        )  # fmt: skip

    def examples(self, seed: int, base: Base) -> Any:
        settings = self.settings(seed, "unused")
        return encode_data(settings, read_data(settings), base.tokenizer, 256)

    def adapted(self, seed: int) -> tuple[Base, Any]:
        """The base with lorakit's adapter on all linear layers of the blocks, and the data."""
        base = open_base(self.model, device="cpu")
        data = self.examples(seed, base)
        set_seed(seed)
        lk.attach(base.model, lk.LoRA(RANK, alpha=2 * RANK), exclude=["lm_head"])
        return base, data

    def loop(self, seed: int) -> tuple[Clock, float]:
        """By hand: what somebody writes who wants just this."""
        base, data = self.adapted(seed)
        model, clock = base.model, Clock()
        parameters = lk.adapter_parameters(model)
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, WARM, self.steps)
        model.config.use_cache = False
        model.train()
        batches = self.batches(data, base, seed)
        for _ in range(self.steps):
            loss = model(**next(batches)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()
            clock.on_step_end()
        return clock, validation(model, data, base)

    def batches(self, data: Any, base: Base, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """In the order that accelerate gives them to a Trainer."""
        examples = Examples(data.train)
        for epoch in count():
            sampler = SeedableRandomSampler(examples, data_seed=seed)
            sampler.set_epoch(epoch)
            yield from DataLoader(
                examples, BATCH, sampler=sampler, collate_fn=lambda rows: collate(rows, base.tokenizer.pad_token_id)
            )

    def command(self, seed: int) -> tuple[Clock, float]:
        """What `lorakit train` runs."""
        settings = self.settings(seed, "ours")
        directory, line, clock = open_directory(settings), Line(quiet=True), Clock()
        prepared = prepare(settings, directory, line)
        begin(directory, prepared.settings, prepared.facts)
        with Stopper() as stopper:
            trainer, _ = build(prepared, directory, line, stopper)
            trainer.add_callback(clock)
            trainer.train()
        return clock, validation(prepared.base.model, prepared.data, prepared.base)

    def peft(self, seed: int) -> tuple[Clock, float]:
        """PEFT under the stock Trainer, which starts from the same A."""
        from peft import LoraConfig, get_peft_model

        base, data = self.adapted(seed)
        starts = {key: value.clone() for key, value in lk.adapter_state_dict(base.model).items() if ".lora_A." in key}
        lk.detach(base.model)
        leaves = sorted(
            {name.rpartition(".")[2] for name, module in base.model.named_modules() if is_block(name, module)}
        )
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=leaves, task_type="CAUSAL_LM")
        set_seed(seed)
        model = get_peft_model(base.model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    parameter.copy_(starts[name.replace(".default.", ".")])
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=str(self.folder / "peft"), max_steps=self.steps, per_device_train_batch_size=BATCH,
            learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=WARM, weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch_fused", seed=seed, data_seed=seed, logging_steps=10, save_strategy="no", use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            log_level="error",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Examples(data.train), callbacks=[clock],
            data_collator=lambda rows: collate(rows, base.tokenizer.pad_token_id),
        )  # fmt: skip
        trainer.pop_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        trainer.train()
        return clock, validation(model, data, base)


def is_block(name: str, module: nn.Module) -> bool:
    """Whether it is a linear layer of a block."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


@torch.no_grad()
def validation(model: nn.Module, data: Any, base: Base) -> float:
    """The mean loss of a trained token on the validation data."""
    model.eval()
    total, number = 0.0, 0
    for start in range(0, len(data.validation), BATCH):
        batch = collate(data.validation[start : start + BATCH], base.tokenizer.pad_token_id)
        labels = batch.pop("labels")
        losses, counts = row_losses(model(**batch).logits, labels)
        total, number = total + losses.sum().item(), number + int(counts.sum())
    return total / number


def main() -> None:
    quiet_imports()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=int, default=150, help="steps of each training of the second table; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = options.model or write_model(folder / "model")
        data = options.data or write_data(folder / "data.jsonl")
        show_costs(Bench(model, data, options.steps, folder), options.rounds)
        if options.quality:
            show_quality(Bench(model, data, options.quality, folder))


def arms_of(bench: Bench) -> dict[str, Callable[[int], tuple[Clock, float]]]:
    """By name."""
    return {"a loop by hand": bench.loop, "lorakit train": bench.command, "PEFT + Trainer": bench.peft}


def show_costs(bench: Bench, rounds: int) -> None:
    """Milliseconds of a step, and against the loop by hand."""
    arms = arms_of(bench)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in sorted(arms, key=lambda name: (list(arms).index(name) + number) % len(arms)):
            found[name].append(arms[name](0)[0].each())
    print(f"{'':16}  ms a step, least  to the loop: least, median of the rounds")
    for name, times in found.items():
        pairs = [mine / its for mine, its in zip(times, found["a loop by hand"], strict=True)]
        least = min(times) / min(found["a loop by hand"])
        print(f"{name:16}  {min(times) * 1e3:16.2f}  {least:18.3f}  {statistics.median(pairs):.3f}")


def show_quality(bench: Bench) -> None:
    """The validation loss after the last step."""
    print(f"\nvalidation loss after {bench.steps} steps, seeds 0, 1, 2")
    for name, arm in arms_of(bench).items():
        losses = [arm(seed)[1] for seed in range(3)]
        spread = statistics.stdev(losses)
        shown = "  ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:16}  {shown}   mean {statistics.mean(losses):.4f} ±{spread / math.sqrt(3):.4f}")


if __name__ == "__main__":
    main()
