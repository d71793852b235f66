"""A plan in a few lines: the layers of a deep model are alike."""

import re

from lorakit.plan import Plan, Row
from lorakit.tables import shape, table

HEADERS = ("layers", "how many", "kind", "W", "trained", "applied", "numbers")


def grouped(plan: Plan) -> list[list[str]]:
    """A row, under `HEADERS`, for all layers that are alike but for the numbers in their names."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in plan.rows:
        tensors = ", ".join(f"{name} {shape(size)}" for name, size in row.tensors.items())
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.layer)
        key = (name, row.kind, shape(row.weight), tensors, row.applied)
        groups.setdefault(key, []).append(row)
    return [
        [key[0], str(len(alike)), *key[1:], f"{sum(row.parameters for row in alike):,}"]
        for key, alike in groups.items()
    ]


def as_table(plan: Plan) -> str:
    """The plan as text."""
    total = f"{plan.parameters:,} new numbers beside {plan.base_parameters:,} frozen ones: {plan.percent:.3g}%"
    body = table(HEADERS, grouped(plan), right=("how many", "numbers"))
    return f"{plan.name}: {plan.variant}\n{body}\n{total}"
