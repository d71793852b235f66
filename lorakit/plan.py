"""What attaching would do, as a value that prints as a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lorakit.errors import LorakitError
from lorakit.index import Index
from lorakit.layers import CalledKind, Foreign, Update, check_read, outline
from lorakit.patterns import Targets
from lorakit.state import check_addition, unwrapped
from lorakit.tables import shape, size, table
from lorakit.targets import Place, RequestedMode, resolve, selected, wholes
from lorakit.variants import Full, Rows, Variant


class Row(NamedTuple):
    """One weight to adapt."""

    layer: str
    """The layer's name, or the parameter's if it was chosen as such."""
    kind: str
    weight: tuple[int, ...]
    """The weight's shape."""
    tensors: dict[str, tuple[int, ...]]
    """The shapes of the trained tensors: {"A": (r, k), "B": (d, r)} for LoRA."""
    bytes: int
    """What the trained tensors take in memory."""
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
    base_bytes: int
    """What they take in memory."""

    @property
    def parameters(self) -> int:
        """Numbers the adapter adds."""
        return sum(row.parameters for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """What Adam keeps for them: two moments for each number."""
        return 2 * sum(row.bytes for row in self.rows)

    @property
    def percent(self) -> float:
        """The adapter's numbers in percent of the base's."""
        return 100 * self.parameters / self.base_parameters if self.base_parameters else math.inf

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
            + f"\nAdam's state: {size(self.optimizer_bytes)}; {size(2 * self.base_bytes)} to train all of the base"
        )


@dataclass(frozen=True)
class Sketch:
    """What the updates at all weights that are alike are like."""

    update: Update
    """One of them, on `meta`."""
    tensors: dict[str, tuple[int, ...]]
    """The shapes of the trained tensors."""
    bytes: int
    """What the trained tensors take in memory."""
    caution: str | None
    """What a user should know of each such weight."""

    @cached_property
    def saved(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that a file holds."""
        return {name: tuple(tensor.shape) for name, tensor in self.update.saved().items()}


class Choice(NamedTuple):
    """A weight to adapt, and what it gets."""

    place: Place
    variant: Variant
    sketch: Sketch


class Sketches:
    """Sketches of updates, each made once for all weights of one kind, shape and dtype that get the same variant."""

    def __init__(self) -> None:
        self._variants: list[Variant] = []
        self._made: dict[Any, Sketch] = {}

    def choice(self, place: Place, variant: Variant) -> Choice:
        """The place with what it gets, checked to have a meaning there.

        Raises:
            LorakitError: it has none.
        """
        weight = place.outline
        check_read(place.layer, place.kind, variant.reads_weight)
        if variant not in self._variants:  # a list: one of somebody else's need not be hashable
            self._variants.append(variant)
        key = self._variants.index(variant), place.kind, place.mode, weight.shape, weight.dtype
        if key not in self._made:
            update = variant.build(place.kind, torch.empty_like(weight, device="meta"), place.mode)
            sizes = {name: tuple(tensor.shape) for name, tensor in update.named_parameters()}
            size = sum(p.numel() * p.element_size() for p in update.parameters())
            self._made[key] = Sketch(update, sizes, size, variant.caution(place.kind, weight))
        return Choice(place, variant, self._made[key])


ByPattern = Mapping[str, float]
"""{pattern: value}: what differs in the weights that a pattern selects."""


def draw_up(
    model: nn.Module,
    variant: Variant,
    targets: Targets,
    exclude: Targets | None,
    mode: RequestedMode,
    name: str,
    ranks: ByPattern | None = None,
    alphas: ByPattern | None = None,
    train_also: Targets | None = None,
    train_rows: Mapping[str, Sequence[int]] | None = None,
) -> tuple[nn.Module, Plan, list[Choice]]:
    """The module that holds the state or will, the plan for these arguments, and its places in the same order.

    Every check is made here; nothing changes.
    """
    if not isinstance(model, nn.Module):
        raise LorakitError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(variant, Variant):
        raise LorakitError(f"the second argument must be a variant such as LoRA(rank=8), not {variant!r}")
    root = check_addition(model, name)
    index = Index(root)
    if root is not unwrapped(model) and _count(index) != _count(Index(model)):
        raise LorakitError(
            f"adapters were attached to a part of this {type(model).__name__}: attach to that part, or detach it first"
        )
    extra = _extra(index, train_also, train_rows)
    taken = {(id(place.layer), place.kind.parameter) for place, _ in extra}
    places = [
        place
        for place in resolve(index, targets, exclude, mode)
        if (id(place.layer), place.kind.parameter) not in taken
    ]
    if places:
        variant = variant.fit([place.kind.matrix_shape(place.outline) for place in places])
    variants = [variant] * len(places)
    for field, patterns in (("rank", ranks), ("alpha", alphas)):
        variants = _varied(index, variants, places, field, {} if patterns is None else patterns)
    sketches = Sketches()
    choices = [_sketched(sketches, *each) for each in (*zip(places, variants, strict=True), *extra)]
    return root, plan_of(index, variant, choices, name), choices


def _extra(
    index: Index, train_also: Targets | None, train_rows: Mapping[str, Sequence[int]] | None
) -> list[tuple[Place, Variant]]:
    """What is trained as a whole, or in rows. It comes before `targets`, which may select it too ("all-linear")."""
    extra: dict[tuple[int, str], tuple[Place, Variant]] = {}
    if train_rows is not None and not isinstance(train_rows, Mapping):
        raise LorakitError(f"train_rows={train_rows!r} must map patterns to rows, such as {{'embed': [7, 8]}}")
    for pattern, rows in (train_rows or {}).items():
        if not isinstance(rows, Iterable):
            raise LorakitError(f"train_rows={train_rows!r}: {rows!r} is no list of rows; give [{rows!r}]")
        for place in resolve(index, pattern, None, "auto"):
            if (id(place.layer), place.kind.parameter) in extra:
                raise LorakitError(f"{place.parameter!r} is selected twice by train_rows: name it once, with all rows")
            beside = isinstance(place.kind, CalledKind) and place.kind.takes == "indices"
            extra[id(place.layer), place.kind.parameter] = (
                place._replace(mode="beside" if beside else "weight"),
                Rows(tuple(rows)),
            )
    for place in wholes(index, train_also) if train_also is not None else ():
        if (id(place.layer), place.kind.parameter) in extra:
            raise LorakitError(f"{place.parameter!r} is selected by train_also and by train_rows: choose one")
        extra[id(place.layer), place.kind.parameter] = place, Full()
    return list(extra.values())


def _varied(
    index: Index, variants: list[Variant], places: list[Place], field: str, patterns: ByPattern
) -> list[Variant]:
    """The variants with one hyper-parameter as the patterns have it; the last that matches a weight counts."""
    if not isinstance(patterns, Mapping):
        raise LorakitError(f"{field}s={patterns!r} must map patterns to values, such as {{'*.q_proj': 16}}")
    varied = list(variants)
    for pattern, value in patterns.items():
        chosen = selected(index, pattern, places)
        if not chosen:
            raise LorakitError(f"{field}s: {pattern!r} matches none of the weights that targets selects")
        for i in chosen:
            if field not in {known.name for known in fields(variants[i])}:
                raise LorakitError(f"{field}s={patterns!r}: {type(variants[i]).__name__} has no {field}")
            varied[i] = replace(varied[i], **{field: value})
    return varied


def plan_of(index: Index, variant: Variant, choices: Sequence[Choice], name: str) -> Plan:
    """The plan for adapting these places."""
    numbers = _numbers(index)
    rows = tuple(_row(choice) for choice in choices)
    return Plan(name, variant, rows, sum(count for count, _ in numbers), sum(count * each for count, each in numbers))


def _sketched(sketches: Sketches, place: Place, variant: Variant) -> Choice:
    """The place with what it gets; what is refused is refused here, by name."""
    try:
        if variant.needs == "gradients" and isinstance(place.kind, Foreign):
            raise LorakitError(
                f"its start needs the gradient of the weight, and a {place.kind.name} ({place.kind.note}) has none; "
                "use another init"
            )
        return sketches.choice(place, variant)
    except LorakitError as error:
        raise LorakitError(f"at {place.label!r}: {error}") from None


def _row(choice: Choice) -> Row:
    place, _, sketch = choice
    notes = [f"also {name}" for name in place.names[1:]] + [f"tied to {name}" for name in place.tied]
    if place.kind.slices:
        notes.append(f"slices {', '.join(place.kind.slices)}")
    if isinstance(place.kind, Foreign):
        notes.append(place.kind.note)
    if sketch.caution:
        notes.append(sketch.caution)
    return Row(
        layer=place.label,
        kind=place.kind.name,
        weight=tuple(place.outline.shape),
        tensors=sketch.tensors,
        bytes=sketch.bytes,
        applied="beside" if place.mode == "beside" else "in the weight",
        note="; ".join(notes),
    )


def _count(index: Index) -> int:
    return sum(count for count, _ in _numbers(index))


def _numbers(index: Index) -> list[tuple[int, int]]:
    """The base's parameters without those of adapters: how many numbers, and the bytes of each.

    Of a foreign layer it is the matrix that it says it is: a packed weight has fewer numbers than that, or none.
    """
    owned: dict[int, tuple[int, int]] = {}
    for key, module in index.modules.items():
        kind = index.foreign(key)
        if kind is not None:
            owned[key] = kind.inputs * kind.outputs, outline(module, kind).element_size()
            owned |= {id(p): (0, 0) for name, p in module._parameters.items() if p is not None and name != "bias"}
        for parameter in module._parameters.values():
            if parameter is not None and not is_lazy(parameter):
                owned.setdefault(id(parameter), (parameter.numel(), parameter.element_size()))
    return list(owned.values())
