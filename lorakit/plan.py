"""What attaching would do, as a value that prints as a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Foreign, Update, as_foreign, check_read, outline
from lorakit.patterns import Targets
from lorakit.state import check_addition, layers_of, root_of, unwrapped
from lorakit.tables import shape, size, table
from lorakit.targets import Place, RequestedMode, resolve, selected, wholes
from lorakit.variants import Full, Rows, Variant


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
) -> tuple[Plan, list[tuple[Place, Variant]]]:
    """The plan for these arguments, and its places in the same order, each with what it gets.

    Every check is made here; nothing changes.
    """
    if not isinstance(model, nn.Module):
        raise LorakitError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(variant, Variant):
        raise LorakitError(f"the second argument must be a variant such as LoRA(rank=8), not {variant!r}")
    check_addition(model, name)
    root = root_of(model)
    if root is not unwrapped(model) and _count(root) != _count(model):
        raise LorakitError(
            f"adapters were attached to a part of this {type(model).__name__}: attach to that part, or detach it first"
        )
    extra = _extra(root, train_also, train_rows)
    taken = {(id(place.layer), place.kind.parameter) for place, _ in extra}
    places = [
        place for place in resolve(root, targets, exclude, mode) if (id(place.layer), place.kind.parameter) not in taken
    ]
    if places:
        variant = variant.fit([place.kind.matrix_shape(place.outline) for place in places])
    variants = [variant] * len(places)
    for field, patterns in (("rank", ranks), ("alpha", alphas)):
        variants = _varied(root, variants, places, field, {} if patterns is None else patterns)
    chosen = [*zip(places, variants, strict=True), *extra]
    return plan_of(root, variant, [(place, mine, _sketch(place, mine)) for place, mine in chosen], name), chosen


def _extra(
    root: nn.Module, train_also: Targets | None, train_rows: Mapping[str, Sequence[int]] | None
) -> list[tuple[Place, Variant]]:
    """What is trained as a whole, or in rows. It comes before `targets`, which may select it too ("all-linear")."""
    extra: dict[tuple[int, str], tuple[Place, Variant]] = {}
    if train_rows is not None and not isinstance(train_rows, Mapping):
        raise LorakitError(f"train_rows={train_rows!r} must map patterns to rows, such as {{'embed': [7, 8]}}")
    for pattern, rows in (train_rows or {}).items():
        if not isinstance(rows, Iterable):
            raise LorakitError(f"train_rows={train_rows!r}: {rows!r} is no list of rows; give [{rows!r}]")
        for place in resolve(root, pattern, None, "auto"):
            if (id(place.layer), place.kind.parameter) in extra:
                raise LorakitError(f"{place.parameter!r} is selected twice by train_rows: name it once, with all rows")
            beside = isinstance(place.kind, CalledKind) and place.kind.takes == "indices"
            extra[id(place.layer), place.kind.parameter] = (
                replace(place, mode="beside" if beside else "weight"),
                Rows(tuple(rows)),
            )
    for place in wholes(root, train_also) if train_also is not None else ():
        if (id(place.layer), place.kind.parameter) in extra:
            raise LorakitError(f"{place.parameter!r} is selected by train_also and by train_rows: choose one")
        extra[id(place.layer), place.kind.parameter] = place, Full()
    return list(extra.values())


def _varied(
    root: nn.Module, variants: list[Variant], places: list[Place], field: str, patterns: ByPattern
) -> list[Variant]:
    """The variants with one hyper-parameter as the patterns have it; the last that matches a weight counts."""
    if not isinstance(patterns, Mapping):
        raise LorakitError(f"{field}s={patterns!r} must map patterns to values, such as {{'*.q_proj': 16}}")
    varied = list(variants)
    for pattern, value in patterns.items():
        chosen = selected(root, pattern, places)
        if not chosen:
            raise LorakitError(f"{field}s: {pattern!r} matches none of the weights that targets selects")
        for i in chosen:
            if field not in {known.name for known in fields(variants[i])}:
                raise LorakitError(f"{field}s={patterns!r}: {type(variants[i]).__name__} has no {field}")
            varied[i] = replace(varied[i], **{field: value})
    return varied


def plan_of(root: nn.Module, variant: Variant, chosen: Sequence[tuple[Place, Variant, Update]], name: str) -> Plan:
    """The plan for adapting these places, each with its variant and its update, or a sketch of that on `meta`."""
    numbers = _numbers(root)
    rows = tuple(_row(*each) for each in chosen)
    return Plan(name, variant, rows, sum(count for count, _ in numbers), sum(count * each for count, each in numbers))


def _sketch(place: Place, variant: Variant) -> Update:
    """The update for this place, on `meta`: of the right shapes, and checked to have a meaning there."""
    sketch = torch.empty_like(place.outline, device="meta")
    try:
        check_read(place.layer, place.kind, variant.reads_weight)
        if variant.needs == "gradients" and isinstance(place.kind, Foreign):
            raise LorakitError(
                f"its start needs the gradient of the weight, and a {place.kind.name} ({place.kind.note}) has none; "
                "use another init"
            )
        return variant.build(place.kind, sketch, place.mode)
    except LorakitError as error:
        raise LorakitError(f"at {place.label!r}: {error}") from None


def _row(place: Place, variant: Variant, update: Update) -> Row:
    weight = place.outline
    notes = [f"also {name}" for name in place.names[1:]] + [f"tied to {name}" for name in place.tied]
    if place.kind.slices:
        notes.append(f"slices {', '.join(place.kind.slices)}")
    if isinstance(place.kind, Foreign):
        notes.append(place.kind.note)
    caution = variant.caution(place.kind, weight)
    return Row(
        layer=place.label,
        kind=place.kind.name,
        weight=tuple(weight.shape),
        tensors={name: tuple(tensor.shape) for name, tensor in update.named_parameters()},
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in update.parameters()),
        applied="beside" if place.mode == "beside" else "in the weight",
        note="; ".join([*notes, *([caution] if caution else [])]),
    )


def _count(model: nn.Module) -> int:
    return sum(count for count, _ in _numbers(model))


def _numbers(model: nn.Module) -> list[tuple[int, int]]:
    """The base's parameters without those of adapters: how many numbers, and the bytes of each.

    Of a foreign layer it is the matrix that it says it is: a packed weight has fewer numbers than that, or none.
    """
    owned: dict[int, tuple[int, int]] = {}
    for module in {id(module): module for _, module in layers_of(model)}.values():
        kind = as_foreign(module)
        if kind is not None:
            owned[id(module)] = kind.inputs * kind.outputs, outline(module, kind).element_size()
            owned |= {id(p): (0, 0) for name, p in module._parameters.items() if p is not None and name != "bias"}
        for parameter in module._parameters.values():
            if parameter is not None and not is_lazy(parameter):
                owned.setdefault(id(parameter), (parameter.numel(), parameter.element_size()))
    return list(owned.values())
