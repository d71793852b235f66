"""How well a base and its adapters do on examples: perplexity of what is trained on, and answers that match."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.errors import LorakitError
from lorakit.finetune.base import Base
from lorakit.finetune.data import Example, Rows, collate
from lorakit.finetune.generation.generate import Answer, Chosen, Request, acting, context_of, generate
from lorakit.finetune.generation.prompts import Prompter
from lorakit.finetune.generation.steps import Sampling

Match = Callable[[str, str], bool]
"""(expected, got) → whether that is as good."""

_LOGITS = 2**28
"""Logits that are in memory at once, at most: 1 GB in float32."""


class Score(NamedTuple):
    """The loss of examples.

    Attributes:
        nats: -log p of each example's trained tokens together.
        counts: how many trained tokens each has.
    """

    nats: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Trained tokens in all."""
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """-log p of a trained token in the mean: every token counts alike, whatever example it is of."""
        return math.fsum(self.nats) / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is above all numbers."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def score(
    base: Base,
    examples: Sequence[Example],
    chosen: Chosen = None,
    *,
    batch_size: int = 8,
    moved: Callable[[int], None] | None = None,
) -> Score:
    """The loss of examples on the tokens that training is on, by their masks.

    It depends neither on the batch nor on padding, but for rounding.

    Args:
        base: the base, with its adapters.
        examples: what `encode` gave.
        chosen: which adapter acts; None is the base alone.
        batch_size: examples at once; fewer where their logits would take more than a gigabyte.
        moved: called with the number of examples that are done.
    """
    nats, counts = [0.0] * len(examples), [0] * len(examples)
    mode, done = base.model.training, 0
    base.model.train(False)
    try:
        with acting(base.model, chosen), torch.no_grad():
            for batch in _batches(base, examples, batch_size):
                losses, trained = _losses(base, [examples[i] for i in batch])
                for i, own, count in zip(batch, losses.tolist(), trained.tolist(), strict=True):
                    nats[i], counts[i] = own, count
                done += len(batch)
                if moved is not None:
                    moved(done)
    finally:
        base.model.train(mode)
    return Score(tuple(nats), tuple(counts))


def _batches(base: Base, examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Of like length, the longest first."""
    width = int(getattr(base.model.config.get_text_config(), "vocab_size", 1))
    ordered = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    while ordered:
        count = max(1, min(size, _LOGITS // (width * max(1, len(examples[ordered[0]])))))
        yield ordered[:count]
        ordered = ordered[count:]


def _losses(base: Base, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """-log p of each example's trained tokens, (n,) in float64, and how many those are."""
    batch = collate(examples, base.tokenizer.pad_token_id or 0)
    device = base.model.device
    model: Any = base.model
    logits = model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
    ).logits
    labels = batch["labels"][:, 1:].to(logits.device)  # the logits of a token are of the one after it
    trained = labels >= 0
    losses = torch.zeros(labels.shape, dtype=torch.float64, device="cpu")
    each = F.cross_entropy(logits[:, :-1][trained].float(), labels[trained], reduction="none")
    losses[trained.cpu()] = each.double().cpu()
    return losses.sum(-1), trained.sum(-1)


class Question(NamedTuple):
    """A prompt, and the answer that is expected."""

    where: str
    tokens: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Result:
    """What came of a question."""

    question: Question
    got: str
    matched: bool
    answer: Answer


def questions_of(rows: Rows, prompter: Prompter) -> tuple[list[Question], int]:
    """The rows that have an answer, as prompts; and how many prompts leave no room in the model's context."""
    found, lost = [], 0
    context = context_of(prompter.base.model)
    for row in rows:
        tokens, expected = prompter.asked(row)
        if expected is None:
            continue
        if context is not None and len(tokens) >= context:
            lost += 1
        else:
            found.append(Question(row.where, tokens, expected))
    return found, lost


def is_same(expected: str, got: str) -> bool:
    """Whether two answers are the same but for space around them."""
    return expected.strip() == got.strip()


def answer_length(base: Base, questions: Sequence[Question]) -> int:
    """Tokens that leave room for answers longer than any that is expected."""
    longest = max((len(base.tokenizer(q.expected)["input_ids"]) for q in questions), default=0)
    return 2 * longest + 16


def ask(
    base: Base,
    questions: Sequence[Question],
    chosen: Chosen = None,
    *,
    sampling: Sampling | None = None,
    match: Match = is_same,
    ends: frozenset[int] = frozenset(),
    batch_size: int = 16,
    moved: Callable[[int], None] | None = None,
) -> list[Result]:
    """Answer questions greedily, in batches, and compare.

    Args:
        base: the base, with its adapters.
        questions: what `questions_of` gave.
        chosen: which adapter answers.
        sampling: how tokens are chosen; by default the most probable, with room for answers longer than expected.
        match: whether what was got is as good as what is expected: by default the same text, but for space around it.
        ends: tokens that end an answer, beside the tokenizer's.
        batch_size: questions at once.
        moved: called with the number of questions that are done.

    Raises:
        LorakitError: see `generate`; or `match` failed, which names the row.
    """
    how = Sampling(answer_length(base, questions)) if sampling is None else sampling
    done = 0

    def finished(i: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        if moved is not None:
            moved(done)

    requests = [Request(question.tokens, chosen) for question in questions]
    answers = generate(base, requests, how, ends=ends, batch_size=batch_size, finished=finished)
    results = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            matched = bool(match(question.expected, answer.text))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise LorakitError(f"{question.where}: comparing answers failed: {said}") from error
        results.append(Result(question, answer.text, matched, answer))
    return results
