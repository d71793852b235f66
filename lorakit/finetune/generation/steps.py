"""What happens at each step of generation: which token is next in each row, and whether the row is at its end.

Both see each row by itself: what a row becomes does not depend on the others, nor on its padding.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.finetune.generation.text import TextStream

Ended = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when it is enough.

    Attributes:
        max_new_tokens: tokens at most; fewer if the context of the model is full before.
        temperature: 0 takes the most probable token; above, tokens are drawn from softmax(logits/temperature).
        top_p: of the smallest set of tokens whose probabilities add up to this; 1 is all.
        top_k: of this many most probable tokens; 0 is all.
        repetition_penalty: logits of tokens that were there are divided by this, or multiplied if below 0
            (arXiv:1909.05858, §4.1); 1 is none.
        seed: of what is drawn; None is another one each time.
        stop: texts before which it ends.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
            return isinstance(value, kind) and not isinstance(value, bool)

        real = (int, float)
        checks = {
            "max_new_tokens": (is_number(self.max_new_tokens, int) and self.max_new_tokens >= 1, "1 or more"),
            "temperature": (is_number(self.temperature, real) and 0 <= self.temperature < 1e6, "0 or more"),
            "top_p": (is_number(self.top_p, real) and 0 < self.top_p <= 1, "above 0, and 1 at most"),
            "top_k": (is_number(self.top_k, int) and self.top_k >= 0, "a whole number, 0 or more"),
            "repetition_penalty": (
                is_number(self.repetition_penalty, real) and 0 < self.repetition_penalty < 1e6,
                "above 0",
            ),
            "seed": (self.seed is None or is_number(self.seed, int), "a whole number"),
            "stop": (not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop), "texts"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise LorakitError(f"{name}={getattr(self, name)!r} must be {wanted}")


class Choose:
    """Logits → scores of which the largest is the next token: a processor of logits for transformers.

    Drawing from a softmax is taking the largest of the logits with Gumbel noise added; each row has noise of its own.
    """

    def __init__(self, sampling: Sampling, rows: Sequence["Row"], longest: int) -> None:
        self._sampling, self._rows = sampling, rows
        self._padding = [longest - len(row.prompt) - len(row.tokens) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` (n, t), padded on the left; `scores` (n, vocabulary), logits in float32."""
        how = self._sampling
        if scores.isnan().any():
            raise LorakitError(
                "the model computes NaN: its weights, or the adapter's, are damaged or overflow in this dtype"
            )
        if how.repetition_penalty != 1:
            scores = self._penalized(input_ids, scores)
        if how.temperature == 0:
            return scores
        scores = scores / how.temperature
        if 0 < how.top_k < scores.shape[-1]:
            least = scores.topk(how.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if how.top_p < 1:
            scores = _nucleus(scores, how.top_p)
        waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=row.noise) for row in self._rows])
        # The smallest positive number, so that no noise is infinite.
        return scores - waits.clamp_(min=torch.finfo(waits.dtype).tiny).log_().to(scores.device)

    def _penalized(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, padding in enumerate(self._padding):
            there = input_ids[row, padding:].unique()
            own = scores[row, there]
            penalty = self._sampling.repetition_penalty
            scores[row, there] = torch.where(own > 0, own / penalty, own * penalty)
        return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The scores of the most probable tokens that add up to `top_p`, and -∞ for the others; at least one is kept."""
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = before >= top_p
    dropped[:, 0] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


class Row:
    """One row while it is written.

    Attributes:
        number: which of the batch it is.
        prompt: the tokens it begins with.
        stream: its text.
        limit: new tokens at most.
        noise: what its tokens are drawn with.
        ends: tokens that end its text.
        tokens: what it was given, without the end.
        ended: why it ended; None as long as it has not.
        seconds: from the start of the batch to its end.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        stream: TextStream,
        limit: int,
        seed: int,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.number, self.prompt, self.stream, self.limit, self.ends = number, prompt, stream, limit, ends
        # On the CPU: the same seed gives the same noise on every device.
        self.noise = torch.Generator("cpu").manual_seed(seed)
        self.tokens: list[int] = []
        self.ended: Ended | None = None
        self.seconds = 0.0


class Watch:
    """Which rows are at their end: a stopping criterion for transformers.

    Args:
        rows: one for each row of the batch.
        heard: called with a row's number and each new piece of its text; None if nobody listens.
        begun: when the batch began.
        eager: whether text is needed at each step, to find stop strings.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        heard: Callable[[int, str], None] | None,
        begun: float,
        *,
        eager: bool,
    ) -> None:
        self._rows, self._heard, self._begun = rows, heard, begun
        self._eager = eager or heard is not None

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **more: Any) -> Tensor:
        """`input_ids` (n, t), of which the last column is new; gives (n,), true for rows that are done."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.ended is None:
                self._step(row, token)
        return torch.tensor([row.ended is not None for row in self._rows], device=input_ids.device)

    def _step(self, row: Row, token: int) -> None:
        piece = ""
        if token in row.ends:
            row.ended = "end"
        else:
            row.tokens.append(token)
            if self._eager:
                piece = row.stream.add(token)
            row.ended = "stop" if row.stream.stopped else "length" if len(row.tokens) == row.limit else None
        if row.ended is not None:
            row.seconds = time.perf_counter() - self._begun
            piece += self._rest(row)
        if piece and self._heard is not None:
            self._heard(row.number, piece)

    def _rest(self, row: Row) -> str:
        """What is left to say of a row."""
        if not self._eager:
            for token in row.tokens:
                row.stream.add(token)
        return row.stream.end()


def seed_of(seed: int, tokens: Sequence[int], repeat: int) -> int:
    """The seed of one row: of the prompt, and which of several like it, so that nothing depends on the batch."""
    digest = hashlib.sha256(f"{seed}:{repeat}:{','.join(map(str, tokens))}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
