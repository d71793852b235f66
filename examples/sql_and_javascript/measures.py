"""What a model can do on a task: perplexity of the completions, exact matches, and results of running what it wrote."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.sql_and_javascript.pairs import Task
from lorakit.finetune.base import Base
from lorakit.finetune.data import collate, encode, prompt_of, read_rows
from lorakit.finetune.generation import Request, acting, generate
from lorakit.finetune.generation_steps import Sampling
from lorakit.finetune.trainer import row_losses

_ROWS = 32
"""Rows at once, in measuring and in writing."""


@dataclass(frozen=True)
class Score:
    """Of one set of pairs."""

    pairs: int
    perplexity: float
    """For each token of the completions."""
    exact: float
    """The share of completions that were written letter by letter."""
    right: float | None
    """The share of those that gave what the gold code gives when run; None where they cannot be run."""


def examples_of(path: Path, base: Base, length: int) -> Sequence[Any]:
    """A file of pairs as `lorakit train` encodes it."""
    return encode(read_rows(str(path)), base.tokenizer, max_length=length).examples


@torch.no_grad()
def mean_loss(base: Base, examples: Sequence[Any]) -> float:
    """The mean cross-entropy of each trained token."""
    base.model.eval()
    total, count = 0.0, 0
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), _ROWS):
        batch = collate(ordered[start : start + _ROWS], base.tokenizer.pad_token_id)
        labels = batch.pop("labels")
        losses, counts = row_losses(base.model(**batch, use_cache=False).logits, labels)
        total, count = total + losses.double().sum().item(), count + int(counts.sum())
    return total / count


def requests_of(path: Path, base: Base, adapter: str | None) -> list[Request]:
    """The prompts of a file, for this adapter."""
    return [Request(tuple(prompt_of(row, base.tokenizer)[0]), adapter) for row in read_rows(str(path))]


def written(base: Base, requests: Sequence[Request], longest: int) -> list[str]:
    """What is written greedily; a line ends it, as every completion is one line."""
    sampling = Sampling(max_new_tokens=longest, stop=("\n",))
    return [answer.text.strip() for answer in generate(base, requests, sampling, batch_size=2 * _ROWS)]


def score(
    base: Base, adapter: str | None, task: Task, path: Path, length: int
) -> tuple[dict[str, Score], list[str]]:
    """Scores on each set of the task's test part, and what was written for each of its pairs.

    Args:
        base: with its adapters.
        adapter: which one acts; None for the base alone.
        task: whose test part it is.
        path: the file of the test part.
        length: tokens of a pair at most.
    """
    examples = examples_of(path, base, length)
    longest = max(int(example.mask.sum()) for example in examples) + 8
    texts = written(base, requests_of(path, base, adapter), longest)
    right = judged(task, texts)
    scores = {}
    for origin in dict.fromkeys(pair.origin for pair in task.test):
        mine = [i for i, pair in enumerate(task.test) if pair.origin == origin]
        with acting(base.model, adapter):
            loss = mean_loss(base, [examples[i] for i in mine])
        scores[origin] = Score(
            pairs=len(mine),
            perplexity=math.exp(min(loss, 700.0)),
            exact=sum(texts[i] == task.test[i].completion for i in mine) / len(mine),
            right=sum(right[i] for i in mine) / len(mine) if right and origin in task.runs else None,
        )
    return scores, texts


def judged(task: Task, texts: Sequence[str]) -> list[bool]:
    """Whether each text gives what its pair's completion gives when run; empty where nothing can be run."""
    if task.run is None:
        return []
    learn = getattr(task.run, "learn", None)
    if learn is not None:  # all at once: a process for each would take minutes
        learn([*(pair.completion for pair in task.test), *texts])
    return [pair.origin in task.runs and task.run(pair, text) for pair, text in zip(task.test, texts, strict=True)]
