"""Training on a task: an adapter by `lorakit train` as a reader would run it, or all numbers by a plain loop.

Both have the same pairs, tokens, steps, batches of the same size and schedule (warm-up of 3%, then a cosine to zero),
clip at 1, and keep the best of the same number of looks at the validation loss. Each has a learning rate of its own.
"""

import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.sql_and_javascript.measures import examples_of, loss_of
from lorakit.errors import LorakitError
from lorakit.finetune.base import Base, open_base
from lorakit.finetune.data import collate
from lorakit.finetune.quiet import quiet_transformers
from lorakit.storage import write_whole

LOOKS = 5
"""Evaluations in a training."""


@dataclass(frozen=True)
class Budget:
    """What a training may cost, and its learning rates."""

    steps: int
    batch: int
    length: int
    """Tokens of a pair at most."""
    rank: int
    adapter_rate: float
    full_rate: float
    seed: int = 0

    @property
    def every(self) -> int:
        """Steps between two looks."""
        return max(1, self.steps // LOOKS)


@dataclass(frozen=True)
class Trained:
    """What came of full fine-tuning."""

    path: Path
    """The model's directory."""
    parameters: int
    seconds: float
    """That its steps took."""
    validation: float
    """Its loss for each token of the validation completions."""


def config_of(model: Path | str, data: Path, out: Path, name: str, budget: Budget) -> str:
    """The text of a configuration for `lorakit train`."""
    import yaml

    settings = {
        "model": str(model),
        "data": str(data / "train.jsonl"),
        "validation": str(data / "validation.jsonl"),
        "name": name,
        "out": str(out),
        "overwrite": True,
        "device": "cpu",
        "dtype": "float32",
        "rank": budget.rank,
        "learning_rate": budget.adapter_rate,
        "steps": budget.steps,
        "batch_size": budget.batch,
        "max_length": budget.length,
        "eval_every": budget.every,
        "eval_batch_size": 4 * budget.batch,
        "log_every": max(1, budget.steps // 20),
        "keep_last": 1,
        "samples": 1,
        "seed": budget.seed,
    }
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def train_adapter(config: Path, out: Path, say: Callable[[str], None]) -> float:
    """Run `lorakit train CONFIG` in a process of its own, whose run goes to `out`.

    Returns:
        The seconds that its steps took; importing, evaluations and reports are not counted.

    Raises:
        LorakitError: it failed.
    """
    words = ["train", str(config)]
    say(f"$ lorakit {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-m", "lorakit", *words], check=False)
    if done.returncode != 0:
        raise LorakitError(f"lorakit train {config} failed, as it says above")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(float(json.loads(line).get("seconds", 0.0)) for line in lines)


def fine_tune(model: Path | str, data: Path, out: Path, budget: Budget, say: Callable[[str], None]) -> Trained:
    """Train all numbers of the model, and write it to `out` as a directory of transformers."""
    base = open_base(model, device="cpu", dtype="float32")
    loss, seconds = descend(base, data, budget, say)
    with quiet_transformers():
        base.model.save_pretrained(out)
        base.tokenizer.save_pretrained(out)
    numbers = sum(parameter.numel() for parameter in base.model.parameters())
    return Trained(out, numbers, seconds, loss)


def descend(base: Base, data: Path, budget: Budget, say: Callable[[str], None]) -> tuple[float, float]:
    """The plain loop; the model holds the best weights afterwards.

    Returns:
        Their validation loss, and the seconds that the steps took.
    """
    model: Any = base.model
    train = examples_of(data / "train.jsonl", base, budget.length)
    validation = examples_of(data / "validation.jsonl", base, budget.length)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=budget.full_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, budget.steps))
    batches = _batches(train, budget)
    best, kept = math.inf, {}
    seconds = 0.0
    for step in range(1, budget.steps + 1):
        start = time.perf_counter()
        model.train()
        loss = model(**collate(next(batches), base.tokenizer.pad_token_id), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % budget.every == 0 or step == budget.steps:
            found = loss_of(base, None, validation)
            say(f"  step {step} of {budget.steps}  loss {loss.item():.3f}  validation {found:.3f}")
            if found < best:
                best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    model.eval()
    return best, seconds


def _share(step: int, steps: int) -> float:
    """Of the learning rate: as transformers' cosine schedule with warm-up, which `lorakit train` uses."""
    warm = math.ceil(0.03 * steps)
    if step < warm:
        return step / max(1, warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(examples: Sequence[Any], budget: Budget) -> Iterator[list[Any]]:
    """Each example once in every epoch, in an order drawn anew."""
    draw = torch.Generator().manual_seed(budget.seed)
    while True:
        order = torch.randperm(len(examples), generator=draw).tolist()
        for start in range(0, len(order), budget.batch):
            yield [examples[i] for i in order[start : start + budget.batch]]


def write_config(path: Path, text: str, title: str) -> None:
    """The configuration with a line on what it is."""
    write_whole(path, f"# {title}; run it with: lorakit train {path}\n{text}".encode())
