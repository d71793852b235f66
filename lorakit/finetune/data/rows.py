"""Rows: what a file of examples says, each with the place it stands at, before any tokenizer has seen it."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

from lorakit.errors import LorakitError

KINDS = ("messages", "prompt", "instruction", "text")


class Row(NamedTuple):
    """One example as it was read.

    Content by kind, all of it text unless said otherwise:

    - messages: {"messages": [{"role", "content"}, ...]}, with "first" (int), the first message that may be trained
      on, if not all are, and "tools" (list), if there are any;
    - prompt: {"prompt", "completion"};
    - instruction: {"instruction", "input", "output"}, the input maybe empty;
    - text: {"text"}.
    """

    where: str
    """The place, for messages: `train.jsonl:17`."""
    kind: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one file or data set, all of one kind."""

    source: str
    kind: str
    columns: Mapping[str, str]
    """The column that each role was read from: {"prompt": "question", ...}."""
    ignored: tuple[str, ...]
    """Columns that were not read."""
    items: Sequence[Row]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    def __str__(self) -> str:
        read = ", ".join(role if role == name else f"{role} = {name}" for role, name in self.columns.items())
        ignored = f"; not read: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.source}: {len(self):,} rows of {read}{ignored}"


def split_off(rows: Rows, share_or_count: float | int, seed: int) -> tuple[Rows, Rows]:
    """Set rows apart for validation: the same ones for the same rows, number and seed, on every machine.

    Both parts keep the order of the rows.

    Args:
        rows: what `read_rows` gave.
        share_or_count: a share of the rows (a float below 1, at least one row), or their number (an int); 0 for none.
        seed: of the choice.

    Returns:
        The rows to train on, and those set apart.

    Raises:
        LorakitError: the share or number is none, or leaves nothing to train on.
    """
    total, asked = len(rows), share_or_count
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not math.isfinite(asked) or asked < 0:
        raise LorakitError(f"cannot set {asked!r} rows apart: give a share such as 0.05, or a number of rows")
    if isinstance(asked, float) and asked >= 1 and not asked.is_integer():
        raise LorakitError(f"cannot set {asked} rows apart: give a share below 1, or a whole number of rows")
    count = int(asked) if isinstance(asked, int) or asked >= 1 else max(1, round(asked * total)) if asked else 0
    if count >= total and count:
        what = f"{total} row{'s' * (total != 1)}"
        raise LorakitError(f"{rows.source} has {what}: setting {count} apart leaves none to train on")
    apart = set(random.Random(seed).sample(range(total), count))
    parts = (
        [row for i, row in enumerate(rows.items) if i not in apart],
        [row for i, row in enumerate(rows.items) if i in apart],
    )
    return replace(rows, items=parts[0]), replace(rows, items=parts[1])
