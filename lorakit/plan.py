"""What attaching would do, as a value that prints as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lorakit.errors import LorakitError
from lorakit.layers import Adapters
from lorakit.patterns import Targets
from lorakit.state import check_addition, root_of
from lorakit.tables import shape, table
from lorakit.targets import Place, RequestedMode, resolve
from lorakit.variants import Variant


@dataclass(frozen=True)
class Row:
    """One weight to adapt."""

    layer: str
    """The layer's name, or the parameter's if it was chosen as such."""
    kind: str
    weight: tuple[int, ...]
    """The weight's shape."""
    tensors: dict[str, tuple[int, ...]]
    """The shapes of the trained tensors: {"A": (r, k), "B": (d, r)} for LoRA."""
    applied: str
    """"beside" the layer's call, or "in the weight"."""
    note: str
    """Other names of a shared layer, ties of its weight, a warning; "" if there is nothing to say."""

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(size) for size in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    """What `attach` does, or did."""

    name: str
    variant: Variant
    rows: tuple[Row, ...]
    base_parameters: int
    """Numbers in the base model, each shared one counted once."""

    @property
    def parameters(self) -> int:
        """Numbers the adapter adds."""
        return sum(row.parameters for row in self.rows)

    @property
    def percent(self) -> float:
        """The adapter's numbers in percent of the base's."""
        return 100 * self.parameters / self.base_parameters

    def __str__(self) -> str:
        tensors = list(dict.fromkeys(name for row in self.rows for name in row.tensors))
        notes = any(row.note for row in self.rows)
        rows = [
            [
                row.layer,
                row.kind,
                shape(row.weight),
                *(shape(row.tensors.get(name, ())) for name in tensors),
                row.applied,
                f"{row.parameters:,}",
                f"{100 * row.parameters / math.prod(row.weight):.3g}%",
                *([row.note] if notes else []),
            ]
            for row in self.rows
        ]
        headers = ["layer", "kind", "W", *tensors, "applied", "parameters", "of W", *(["note"] if notes else [])]
        return (
            f"{self.name}: {self.variant}\n"
            + table(headers, rows, right=("parameters", "of W"))
            + f"\n{self.parameters:,} new numbers beside {self.base_parameters:,} frozen ones: {self.percent:.3f}%"
        )


def draw_up(
    model: nn.Module,
    variant: Variant,
    targets: Targets,
    exclude: Targets | None,
    mode: RequestedMode,
    name: str,
) -> tuple[Plan, list[Place]]:
    """The plan for these arguments, and its places in the same order. Every check is made here; nothing changes."""
    if not isinstance(model, nn.Module):
        raise LorakitError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(variant, Variant):
        raise LorakitError(f"the second argument must be a variant such as LoRA(rank=8), not {variant!r}")
    check_addition(model, name)
    root = root_of(model)
    if _count(root) != _count(model):
        raise LorakitError(
            f"adapters were attached to a part of this {type(model).__name__}: attach to that part, or detach it first"
        )
    places = resolve(root, targets, exclude, mode)
    return plan_of(root, variant, places, name), places


def plan_of(
    root: nn.Module, variant: Variant, places: Sequence[Place], name: str, each: Sequence[Variant] | None = None
) -> Plan:
    """The plan for adapting these places; `each` has the variant of each place where they differ."""
    variants = each or [variant] * len(places)
    return Plan(name, variant, tuple(map(_row, places, variants)), _count(root))


def _row(place: Place, variant: Variant) -> Row:
    weight = place.weight
    sketch = torch.empty_like(weight, device="meta")
    try:
        update = variant.build(place.kind, sketch, place.mode)
    except LorakitError as error:
        raise LorakitError(f"at {place.label!r}: {error}") from None
    notes = [f"also {name}" for name in place.names[1:]] + [f"tied to {name}" for name in place.tied]
    if place.kind.slices:
        notes.append(f"slices {', '.join(place.kind.slices)}")
    caution = variant.caution(place.kind, sketch)
    return Row(
        layer=place.label,
        kind=place.kind.name,
        weight=tuple(weight.shape),
        tensors={name: tuple(tensor.shape) for name, tensor in update.named_parameters()},
        applied="beside" if place.mode == "beside" else "in the weight",
        note="; ".join([*notes, *([caution] if caution else [])]),
    )


def _count(model: nn.Module) -> int:
    """The base's parameters, without those of adapters."""
    added = {id(p) for m in model.modules() if isinstance(m, Adapters) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in added and not is_lazy(p))
