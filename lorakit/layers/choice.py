"""The model's choice among its adapters: one for all of it, or one for each row of a batch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, final

import torch
from torch import Tensor

Table = list[Any]
"""The updates (`adapters.Update`) of one adapter, at the places of the weights they are for; None where it has none."""


@final
@dataclass
class Selection:
    """The adapters that act now. One object per model, shared by all its layers.

    Every adapted weight has a place, a number, and every adapter a table of its updates by place. To switch is to point
    at another table: a layer then finds its update without a name to look up, and code that `torch.compile` made finds
    other tensors in the same place. Tables are not copied or pickled with a part of the model, which would drag along
    all the rest; a copy looks its updates up by name until `reindex` is called.
    """

    active: tuple[tuple[str, float], ...] = ()
    """Each with its strength."""
    rows: "RowChoice | None" = None
    """If there is a choice for each row of the batch."""
    tables: dict[str, Table] | None = field(default_factory=dict)
    """None in a copy."""
    acting: list[tuple[Table, float]] | None = field(default_factory=list)
    """The tables of the active adapters, each with its strength; None in a copy."""
    reading: set[str] = field(default_factory=set)
    """The adapters that act in a weight somewhere."""
    strengths: list[Tensor] = field(default_factory=list)
    """The strengths again, for compiled code, which would be compiled anew for every other float."""

    def choose(self, active: Iterable[tuple[str, float]], rows: "RowChoice | None" = None) -> None:
        """Change the choice."""
        self.active, self.rows = tuple(active), rows
        if self.tables is not None:
            self.acting = [(self.tables[name], strength) for name, strength in self.active]
            self.strengths = [scalar(strength, role) for role, (_, strength) in enumerate(self.active)]

    def enter(self, name: str, adapted: Any) -> None:
        """Put the adapter's update of this weight into its table."""
        if self.tables is None:
            return
        place = adapted.place
        if place is None:
            place = max(map(len, self.tables.values()), default=0)
            vars(adapted)["place"] = place
        table = self.tables.setdefault(name, [])
        table.extend([None] * (place + 1 - len(table)))
        table[place] = update = adapted[name]
        if update.mode == "weight":
            self.reading.add(name)

    def forget(self, name: str) -> None:
        """Give up the adapter's table."""
        if self.tables is not None:
            self.tables.pop(name, []).clear()  # layers may still know it, until their next call
            self.reading.discard(name)

    def reindex(self, weights: Iterable[Any]) -> None:
        """Make the tables anew, for a copy."""
        self.tables, self.reading = {}, set()
        for place, adapted in enumerate(weights):
            adapted.place = place
            for name in adapted:
                self.enter(name, adapted)
        self.choose(self.active, self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "rows": self.rows,
            "tables": None,
            "acting": None,
            "reading": set(),
            "strengths": [],
        }


@lru_cache(maxsize=1024)
def scalar(value: float, role: int = -1) -> Tensor:
    """A number as a tensor, made once for each role: compiled code would notice if two of its inputs were one."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


@final
class RowChoice:
    """An adapter for each row of a batch, and what is worked out from that once and not at every call.

    Attributes:
        names: the adapter of each row; None for the base.
        seen: the places of the weights that were called.
        stacks: by the place of a weight, its adapters' factors one after the other (`rows.Stacked`).
    """

    def __init__(self, names: Iterable[str | None]) -> None:
        self.names = tuple(names)
        self.stacks: dict[int | None, Any] = {}
        self.seen: set[int | None] = set()
        self._layouts: dict[tuple[str, ...], Layout] = {}

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The rows of each adapter."""
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                groups.setdefault(name, []).append(row)
        return {name: tuple(rows) for name, rows in groups.items()}

    def layout(self, names: tuple[str, ...], device: torch.device) -> "Layout":
        """How the rows of these adapters are brought together."""
        found = self._layouts.get(names)
        if found is None or found.rows.device != device:
            found = self._layouts[names] = Layout([self.groups[name] for name in names], len(self.names), device)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "stacks": {}, "seen": set(), "_layouts": {}}


@final
class Layout:
    """Rows sorted by adapter, each adapter's as many as the largest has.

    Attributes:
        count: how many adapters there are.
        rows: the rows in that order, shorter groups filled up with row 0.
        filled: where `rows` has rows of its own; None if nothing was filled up.
        in_order: whether that is the batch as it is.
        pays: whether to bring them together at all.
    """

    def __init__(self, groups: list[tuple[int, ...]], total: int, device: torch.device) -> None:
        self.count = len(groups)
        self.largest = max(map(len, groups))
        rows = [row for group in groups for row in (*group, *[0] * (self.largest - len(group)))]
        own = [i * self.largest + j for i, group in enumerate(groups) for j in range(len(group))]
        self.in_order = rows == list(range(total))
        # Filling up is work for nothing, and of a single adapter there is nothing to bring together.
        self.pays = len(groups) > 1 and len(rows) <= 2 * len(own)
        self.rows = torch.tensor(rows, device=device)
        self.filled = None if len(own) == len(rows) else torch.tensor(own, device=device)
