"""Small runs of `lorakit train` for tests: a model, a file of examples, and the settings for a few seconds."""

import gc
import json
from pathlib import Path
from typing import Any

from lorakit.finetune.config import checked
from lorakit.finetune.settings import Settings
from lorakit.finetune.training.run import Outcome, train

gc.freeze()  # accelerate collects at the beginning of each run, which takes a second among all that tests import
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_examples(path: Path, count: int = 40) -> Path:
    """Sums in words."""
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            a, b = i % 10, i // 10 % 10
            out.write(json.dumps({"prompt": f"{WORDS[a]} and {WORDS[b]}: ", "completion": str(a + b)}) + "\n")
    return path


def settings(model: Path, folder: Path, **values: Any) -> Settings:
    """A run of twelve steps in `folder/run`, with a checkpoint at every third and an evaluation at every fourth."""
    data = folder / "data.jsonl"
    if not data.exists():
        write_examples(data)
    usual = {
        "model": str(model), "data": str(data), "out": str(folder / "run"), "name": "it", "steps": 12, "batch_size": 4,
        "rank": 4, "learning_rate": 1e-2, "eval_every": 4, "save_every": 3, "keep_last": 20, "log_every": 2,
        "samples": 1, "sample_length": 4, "device": "cpu", "max_length": 64,
    }  # fmt: skip
    return checked({**usual, **values}, "the test")


def run(model: Path, folder: Path, **values: Any) -> Outcome:
    """The run itself."""
    return train(settings(model, folder, **values))


def adapter_bytes(outcome: Outcome) -> bytes:
    """The adapter that came of it."""
    return (outcome.adapter / "adapter_model.safetensors").read_bytes()
