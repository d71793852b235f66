"""From a file's content to updates that fit a live model: every check, and no change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.change import Addition
from lorakit.errors import LorakitError
from lorakit.fingerprint import checksum, fingerprint
from lorakit.header import Header, WeightEntry, file_key
from lorakit.index import Index
from lorakit.layers import CalledKind, accumulation_dtype, stored_dtype, stored_tensors
from lorakit.patterns import some
from lorakit.plan import Choice, Plan, Sketches, plan_of
from lorakit.storage import all_finite
from lorakit.targets import Place, place_of
from lorakit.variants import Full, LowRank, Rows, Variant

_SHARED = 2**24
"""Numbers that may be made for any model."""


@torch.inference_mode(False)
def build_additions(
    root: nn.Module, header: Header, tensors: Mapping[str, Tensor], name: str, *, verify: str, where: str
) -> tuple[Plan, list[Addition]]:
    """The updates in a file, built for this model, and the plan of them.

    `verify` says how the base is compared with that of the file: "sample", "full" or "off".

    Raises:
        LorakitError: it does not fit; the message lists everything that is wrong.
    """
    problems: list[str] = []
    left = dict(tensors)
    index = Index(root)
    if any(p is not None and p.is_meta for module in index.modules.values() for p in module._parameters.values()):
        raise LorakitError(f"{where} cannot be loaded: the model is on 'meta'; give it values first")
    if not header.ours:
        header = _with_tied_rows(index, header, left)
    if not header.weights:
        problems.append("it adapts no weight")
    lacking = [entry.name for entry in header.weights if entry.full is None] if verify == "full" else []
    if lacking:
        problems.append(f"it holds no checksum of the base weights {some(lacking)} as a whole; use verify='sample'")
    found = _found(index, header, left, problems)
    if found:
        shapes = [place.kind.matrix_shape(place.outline) for _, place in found]
        header = replace(header, variant=header.variant.fit(shapes))
    _check_shared(root, header, where)
    sketches = Sketches()
    chosen: list[tuple[WeightEntry, Choice]] = []
    for entry, place in found:
        try:
            problems += _base_problems(place, entry, verify)
            chosen.append((entry, sketches.choice(place, _variant_at(place, header.variant_of(entry)))))
        except LorakitError as error:
            problems.append(str(error))
            _forget(left, header, entry)
    values = [_take(left, entry, choice, problems) for entry, choice in chosen]
    problems += [f"it holds {key!r}, which is no part of a {type(header.variant).__name__}" for key in left]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{where} does not fit this {type(root).__name__}:{listed}")
    choices = [choice for _, choice in chosen]
    additions = [_filled(choice, mine, header.ours) for choice, mine in zip(choices, values, strict=True)]
    return plan_of(index, header.variant, choices, name), additions


def _check_shared(root: nn.Module, header: Header, where: str) -> None:
    """A file of a few bytes must not make matrices beside which the model is small.

    Raises:
        LorakitError: it would.
    """
    for variant in {header.variant, *(header.variant_of(entry) for entry in header.weights)}:
        if variant.shared_numbers <= _SHARED:  # and nearly every variant shares nothing: the model is not looked at
            continue
        if variant.shared_numbers > 4 * sum(parameter.numel() for parameter in root.parameters()):
            raise LorakitError(
                f"{where} does not fit this {type(root).__name__}: {variant} asks for {variant.shared_numbers:,} "
                "numbers that are shared, far more than the model has; it is damaged, or of a far larger model"
            )


def _found(
    index: Index, header: Header, left: dict[str, Tensor], problems: list[str]
) -> list[tuple[WeightEntry, Place]]:
    """The entries that have a place in this model, each a place of its own."""
    found: list[tuple[WeightEntry, Place]] = []
    owners: dict[tuple[int, str], str] = {}
    for entry in header.weights:
        try:
            place = _place(index, header, entry)
            # A weight has one update of an adapter: a second would take the place of the first.
            first = owners.setdefault((id(place.layer), place.kind.parameter), entry.name)
            if first != entry.name:
                raise LorakitError(f"it holds {first!r} and {entry.name!r}, which are one and the same weight here")
            found.append((entry, place))
        except LorakitError as error:
            problems.append(str(error))
            _forget(left, header, entry)
    return found


def _with_tied_rows(index: Index, header: Header, tensors: dict[str, Tensor]) -> Header:
    """PEFT trains rows of the input embedding in all that transformers ties to it too, and saves them once."""
    model: Any = index.model
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return header
    embedding = model.get_input_embeddings()
    rows = [entry for entry in header.weights if isinstance(header.variant_of(entry), Rows)]
    added = []
    for entry in rows:
        if index.ids.get(entry.path) != id(embedding):
            continue
        tied = {index.parameters[name][0]: name for name in index.tied(embedding, entry.parameter)}
        for name in set(tied.values()) - {other.name for other in rows}:
            path, _, parameter = name.rpartition(".")
            added.append(entry._replace(path=path, parameter=parameter))
            value = tensors[file_key(entry.path, entry.parameter, Rows.file_names["value"], False)]
            tensors[file_key(path, parameter, Rows.file_names["value"], False)] = value.clone()
    return replace(header, weights=(*header.weights, *added))


def _place(index: Index, header: Header, entry: WeightEntry) -> Place:
    """Where an entry is adapted. A file that does not say how, PEFT's, has its dropout on the input of a call."""
    variant = header.variant_of(entry)
    place = place_of(index, entry.path, entry.parameter, entry.mode, isinstance(variant, Full), entry.slices)
    drops = isinstance(variant, LowRank) and variant.dropout > 0
    if entry.mode is None and drops and isinstance(place.kind, CalledKind) and place.mode == "weight":
        return place._replace(mode="beside")
    return place


def _take(left: dict[str, Tensor], entry: WeightEntry, choice: Choice, problems: list[str]) -> dict[str, Tensor]:
    """The tensors of one weight, taken out of those that are left; what is wrong with them is added to the problems."""
    place, variant, sketch = choice
    values: dict[str, Tensor] = {}
    for tensor, shape in sketch.saved.items():
        key = file_key(entry.path, entry.parameter, variant.file_names[tensor], place.kind.lookup)
        if key not in left and entry.kind is None:  # others have one name for both kinds of layers
            other = file_key(entry.path, entry.parameter, variant.file_names[tensor], not place.kind.lookup)
            key = other if other in left else key
        value = left.pop(key, None)
        if value is not None:
            values[tensor] = value
        problem = tensor_problem(key, value, shape)
        if problem is not None:
            problems.append(problem)
    dtypes = {value.dtype for value in values.values()}
    if len(dtypes) > 1:
        several = ", ".join(sorted(map(str, dtypes)))
        problems.append(f"the tensors of {entry.name!r} are of several dtypes: {several}")
    return values


def _filled(choice: Choice, values: Mapping[str, Tensor], ours: bool) -> Addition:
    """The update of one weight, with its tensors."""
    place, variant, sketch = choice
    device = place.outline.device
    if not ours or device.type != "cpu":
        values = {
            tensor: value.to(device, value.dtype if ours else accumulation_dtype(value.dtype))
            for tensor, value in values.items()
        }
    return Addition(place.parameter, place.layer, sketch.update.restored(values), variant)


def _forget(left: dict[str, Tensor], header: Header, entry: WeightEntry) -> None:
    """Take out whatever one weight may have: what is wrong with it was said."""
    for name in header.variant_of(entry).file_names.values():
        for lookup in (False, True):
            left.pop(file_key(entry.path, entry.parameter, name, lookup), None)


def _variant_at(place: Place, variant: Variant) -> Variant:
    """PEFT writes one dropout for all layers and ignores it where inputs are indices; so must who reads its files."""
    drops = place.kind.lookup and getattr(variant, "dropout", 0) > 0
    return replace(variant, **{"dropout": 0.0}) if drops else variant


def tensor_problem(key: str, value: Tensor | None, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor of an adapter that should have this shape; None if nothing."""
    if value is None:
        return f"{key!r} is missing"
    if value.shape != shape:
        return f"{key!r} has shape {tuple(value.shape)}, not {shape}"
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return f"{key!r} is of dtype {value.dtype}; a floating-point one of 16 bits or more is needed"
    if not all_finite(value):
        return f"{key!r} holds NaN or infinity"
    return None


def _base_problems(place: Place, entry: WeightEntry, verify: str) -> list[str]:
    """How the base differs from the one in the file's header, if it says."""
    weight = place.outline
    if entry.shape is None:
        return []
    if tuple(weight.shape) != entry.shape:
        return [f"{entry.name!r} is {tuple(weight.shape)} here and was {entry.shape} when saved"]
    if {entry.kind, type(place.kind).__name__} == {"Linear", "TransposedLinear"}:
        return [
            f"{entry.name!r} is a {type(place.kind).__name__} here, and the file has it as a {entry.kind}, turned round"
        ]
    if verify == "off" or entry.sample is None or weight.is_meta:
        return []
    dtype = stored_dtype(place.layer, place.kind)
    if dtype != entry.dtype:
        return [
            f"{entry.name!r} is {dtype} here and was {entry.dtype} when saved; if this is the same base in another "
            "dtype, use verify='off'"
        ]
    stored = stored_tensors(place.layer, place.kind.parameter)
    if fingerprint(*stored) != entry.sample:
        return [f"{entry.name!r} has other values than the base this adapter was trained on"]
    if verify == "full" and entry.full is not None and checksum(*stored) != entry.full:
        return [f"{entry.name!r} has a few other values than the base this adapter was trained on"]
    return []
