"""What a model can do on a task: perplexity of the completions, exact matches, and results of running what it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.sql_and_javascript.pairs import Task
from lorakit.finetune.base import Base
from lorakit.finetune.data import Example, encode, read_rows
from lorakit.finetune.generation import scoring
from lorakit.finetune.generation.generate import Chosen, Request, generate
from lorakit.finetune.generation.prompts import Prompter
from lorakit.finetune.generation.steps import Sampling

_ROWS = 64
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


def examples_of(path: Path, base: Base, length: int) -> Sequence[Example]:
    """A file of pairs as `lorakit train` encodes it."""
    return encode(read_rows(str(path)), base.tokenizer, max_length=length).examples


def loss_of(base: Base, chosen: Chosen, examples: Sequence[Example]) -> float:
    """The mean cross-entropy of each token of the completions."""
    return scoring.score(base, examples, chosen, batch_size=_ROWS).loss


def requests_of(path: Path, base: Base, chosen: Chosen) -> list[Request]:
    """The prompts of a file, for this adapter."""
    questions, _ = scoring.questions_of(read_rows(str(path)), Prompter(base, "prompt"))
    return [Request(question.tokens, chosen) for question in questions]


def written(base: Base, requests: Sequence[Request], longest: int) -> list[str]:
    """What is written greedily; a line ends it, as every completion is one line."""
    sampling = Sampling(max_new_tokens=longest, stop=("\n",))
    return [answer.text.strip() for answer in generate(base, requests, sampling, batch_size=_ROWS)]


def score(base: Base, chosen: Chosen, task: Task, path: Path, length: int) -> tuple[dict[str, Score], list[str]]:
    """Scores on each set of the task's test part, and what was written for each of its pairs.

    Args:
        base: with its adapters.
        chosen: which one acts; None for the base alone.
        task: whose test part it is.
        path: the file of the test part.
        length: tokens of a pair at most.
    """
    examples = examples_of(path, base, length)
    longest = max(int(example.mask.sum()) for example in examples) + 8
    texts = written(base, requests_of(path, base, chosen), longest)
    right = judged(task, texts)
    scores = {}
    for origin in dict.fromkeys(pair.origin for pair in task.test):
        mine = [i for i, pair in enumerate(task.test) if pair.origin == origin]
        scores[origin] = Score(
            pairs=len(mine),
            perplexity=scoring.score(base, [examples[i] for i in mine], chosen, batch_size=_ROWS).perplexity,
            exact=sum(texts[i] == task.test[i].completion for i in mine) / len(mine),
            right=sum(right[i] for i in mine) / len(mine) if right and origin in task.runs else None,
        )
    return scores, texts


def judged(task: Task, texts: Sequence[str]) -> list[bool]:
    """Whether each text gives what its pair's completion gives when run; empty where nothing can be run."""
    if task.run is None:
        return []
    if task.learn is not None:  # all at once: a process for each would take minutes
        task.learn([*(pair.completion for pair in task.test), *texts])
    return [
        pair.origin in task.runs and task.run(pair.completion, text)
        for pair, text in zip(task.test, texts, strict=True)
    ]
