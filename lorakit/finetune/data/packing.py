"""Packing: several whole examples in one row, each with positions of its own, so that none attends to another."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.finetune.data.examples import Encoded, Example


@dataclass(frozen=True, eq=False)
class Packed:
    """Examples in one row."""

    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))

    @property
    def where(self) -> str:
        """The places of its examples."""
        return ", ".join(example.where for example in self.examples)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens, (n,)."""
        return np.concatenate([example.ids for example in self.examples])

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which tokens are trained on, (n,): never the first of an example, which follows from none before it."""
        return np.concatenate([example.mask for example in self.examples])

    @property
    def positions(self) -> NDArray[np.int64]:
        """The position of each token in its own example, (n,)."""
        return np.concatenate([np.arange(len(example), dtype=np.int64) for example in self.examples])


def pack(encoded: Encoded | Sequence[Example], length: int) -> list[Packed]:
    """Whole examples in rows of at most `length` tokens, best fit, the longest first: the same rows each time.

    Rows, and the examples in them, keep the order of the examples. A model must keep the examples in a row apart, by
    their positions: `check_packing` says whether it does.

    Raises:
        LorakitError: an example is longer than a row.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise LorakitError(f"rows to pack into must have a length of at least 2 tokens, not {length!r}")
    examples = list(encoded)
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by the room left in them
    rooms: list[int] = []  # these rooms, sorted
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[index])
        if size > length:
            where = examples[index].where
            raise LorakitError(f"{where} has {size:,} tokens, and rows to pack into {length:,}: set max_length to that")
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, left = len(rows), length
            rows.append([])
        else:
            left = rooms[at]
            row = room[left].pop()
            if not room[left]:
                del room[left], rooms[at]
        rows[row].append(index)
        left -= size
        if left not in room:
            insort(rooms, left)
            room[left] = []
        room[left].append(row)
    order = sorted(sorted(row) for row in rows)
    return [Packed(tuple(examples[i] for i in row)) for row in order]
