"""What the tasks have in common: pairs of a prompt and its completion, in three parts, and a check by running them."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.storage import write_whole


@dataclass(frozen=True)
class Pair:
    """A prompt, which is a comment that says what is wanted, and the line of code that it asks for."""

    prompt: str
    completion: str
    origin: str
    """The set it belongs to: "geography", "atis", "staff" or "javascript"."""


@dataclass(frozen=True)
class Task:
    """A language to learn."""

    name: str
    """Also that of its adapter: "sql" or "js"."""
    title: str
    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]
    run: Callable[[str, str], bool] | None = None
    """(completion, what was written instead) → whether they have the same results when they are run."""
    runs: Sequence[str] = ()
    """The sets whose code can be run."""
    learn: Callable[[Sequence[str]], None] | None = None
    """Runs many at once, so that `run` knows them."""
    notes: Sequence[str] = field(default=())
    """What a reader of the numbers must know."""

    def parts(self) -> dict[str, Sequence[Pair]]:
        """By the names of their files."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def write_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """JSONL with `prompt` and `completion`, which `lorakit train` recognises."""
    rows = (json.dumps({"prompt": pair.prompt, "completion": pair.completion}, ensure_ascii=False) for pair in pairs)
    write_whole(path, "".join(f"{row}\n" for row in rows).encode())


def apart(
    one: Callable[[random.Random], tuple[tuple[str, ...], Pair]],
    counts: tuple[int, int, int],
    seed: int,
    fits: Callable[[Pair], bool],
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Generated pairs in three parts that share no combination.

    A fifth of all combinations is kept for validation, and a fifth to test.

    Args:
        one: draws a pair and says of which combination it is.
        counts: pairs of each part.
        seed: of all draws.
        fits: whether a pair is short enough.

    Raises:
        LorakitError: there are not so many pairs that are short enough.
    """
    draw = random.Random(seed)
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    seen: set[str] = set()
    for _ in range(40 * sum(counts)):
        combination, pair = one(draw)
        part = (0, 0, 0, 1, 2)[hashlib.sha256(repr(combination).encode()).digest()[0] % 5]
        if len(parts[part]) < counts[part] and pair.prompt not in seen and fits(pair):
            seen.add(pair.prompt)
            parts[part].append(pair)
        if all(len(pairs) == count for pairs, count in zip(parts, counts, strict=True)):
            return parts
    raise LorakitError("too few generated pairs are short enough for this model: give a larger --length")
