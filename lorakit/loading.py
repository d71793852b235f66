"""From a file's content to updates that fit a live model: every check, and no change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.change import Addition
from lorakit.errors import LorakitError
from lorakit.fingerprint import fingerprint
from lorakit.header import Header, WeightEntry, file_key
from lorakit.index import Index
from lorakit.layers import CalledKind, Update, accumulation_dtype, check_read, stored_dtype, stored_tensors
from lorakit.plan import Plan, plan_of
from lorakit.targets import Place, place_of
from lorakit.variants import Full, LowRank, Rows, Variant


@torch.inference_mode(False)
def build_additions(
    root: nn.Module, header: Header, tensors: Mapping[str, Tensor], name: str, *, check_values: bool, where: str
) -> tuple[Plan, list[Addition]]:
    """The updates in a file, built for this model, and the plan of them.

    Raises:
        LorakitError: it does not fit; the message lists everything that is wrong.
    """
    problems: list[str] = []
    chosen: list[tuple[Place, Variant, Update]] = []
    additions: list[Addition] = []
    left = dict(tensors)
    if any(parameter.is_meta for parameter in root.parameters()):
        raise LorakitError(f"{where} cannot be loaded: the model is on 'meta'; give it values first")
    index = Index(root)
    if not header.ours:
        header = _with_tied_rows(index, header, left)
    if not header.weights:
        problems.append("it adapts no weight")
    found = _found(index, header, left, problems)
    if found:
        shapes = [place.kind.matrix_shape(place.outline) for _, place in found]
        header = replace(header, variant=header.variant.fit(shapes))
    for entry, place in found:
        try:
            problems += _base_problems(place, entry, check_values)
            sketch = torch.empty_like(place.outline, device="meta")
            variant = _variant_at(place, header.variant_of(entry))
            check_read(place.layer, place.kind, variant.reads_weight)
            update = variant.build(place.kind, sketch, place.mode)
        except LorakitError as error:
            problems.append(str(error))
            _forget(left, header, entry)
            continue
        mine = _take(left, header, entry, update.saved(), place.kind.lookup)
        problems += _fill(update, mine, place, header, entry)
        chosen.append((place, variant, update))
        additions.append(Addition(place.layer, place.kind, update, variant))
    problems += [f"it holds {key!r}, which is no part of a {type(header.variant).__name__}" for key in left]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{where} does not fit this {type(root).__name__}:{listed}")
    return plan_of(root, header.variant, chosen, name), additions


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
            added.append(replace(entry, path=path, parameter=parameter))
            value = tensors[file_key(entry.path, entry.parameter, Rows.file_names["value"], False)]
            tensors[file_key(path, parameter, Rows.file_names["value"], False)] = value
    return replace(header, weights=(*header.weights, *added))


def _place(index: Index, header: Header, entry: WeightEntry) -> Place:
    """Where an entry is adapted. A file that does not say how, PEFT's, has its dropout on the input of a call."""
    variant = header.variant_of(entry)
    place = place_of(index, entry.path, entry.parameter, entry.mode, isinstance(variant, Full), entry.slices)
    drops = isinstance(variant, LowRank) and variant.dropout > 0
    if entry.mode is None and drops and isinstance(place.kind, CalledKind) and place.mode == "weight":
        return replace(place, mode="beside")
    return place


Found = dict[str, tuple[str, Tensor | None]]
"""{name of the tensor in the update: (its key in the file, its value there)}"""


def _take(
    left: dict[str, Tensor], header: Header, entry: WeightEntry, wanted: Mapping[str, Tensor], lookup: bool
) -> Found:
    """The tensors of one weight, taken out of those that are left."""
    names = header.variant_of(entry).file_names
    return {
        tensor: (key, left.pop(key, None))
        for tensor in wanted
        for key in [file_key(entry.path, entry.parameter, names[tensor], lookup)]
    }


def _forget(left: dict[str, Tensor], header: Header, entry: WeightEntry) -> None:
    """Take out whatever one weight may have: what is wrong with it was said."""
    for name in header.variant_of(entry).file_names.values():
        for lookup in (False, True):
            left.pop(file_key(entry.path, entry.parameter, name, lookup), None)


def _fill(update: Update, mine: Found, place: Place, header: Header, entry: WeightEntry) -> list[str]:
    """Put the tensors of one weight into its update; returns what is wrong with them."""
    problems = []
    tensors = {}
    for tensor, wanted in update.saved().items():
        key, value = mine[tensor]
        problem = _tensor_problem(key, value, wanted)
        if problem:
            problems.append(problem)
        elif value is not None:
            # Copied out of the file's memory, whose alignment could change how a product rounds.
            dtype = value.dtype if header.ours else accumulation_dtype(value.dtype)
            tensors[tensor] = value.to(place.outline.device, dtype, copy=True)
    if not problems:
        update.restore(tensors)
    dtypes = sorted({str(value.dtype) for _, value in mine.values() if value is not None})
    if len(dtypes) > 1:
        problems.append(f"the tensors of {entry.name!r} are of several dtypes: {', '.join(dtypes)}")
    return problems


def _variant_at(place: Place, variant: Variant) -> Variant:
    """PEFT writes one dropout for all layers and ignores it where inputs are indices; so must who reads its files."""
    drops = place.kind.lookup and getattr(variant, "dropout", 0) > 0
    return replace(variant, **{"dropout": 0.0}) if drops else variant


def _tensor_problem(key: str, value: Tensor | None, wanted: Tensor) -> str | None:
    if value is None:
        return f"{key!r} is missing"
    if value.shape != wanted.shape:
        return f"{key!r} has shape {tuple(value.shape)}, not {tuple(wanted.shape)}"
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return f"{key!r} is of dtype {value.dtype}; a floating-point one of 16 bits or more is needed"
    if not value.isfinite().all():
        return f"{key!r} holds NaN or infinity"
    return None


def _base_problems(place: Place, entry: WeightEntry, check_values: bool) -> list[str]:
    """How the base differs from the one in the file's header, if it says."""
    weight = place.outline
    if entry.shape is None:
        return []
    if tuple(weight.shape) != entry.shape:
        return [f"{entry.name!r} is {tuple(weight.shape)} here and was {entry.shape} when saved"]
    if not check_values or entry.sample is None or weight.is_meta:
        return []
    dtype = stored_dtype(place.layer, place.kind)
    if dtype != entry.dtype:
        return [
            f"{entry.name!r} is {dtype} here and was {entry.dtype} when saved; if this is the same base in another "
            "dtype, use verify='off'"
        ]
    if fingerprint(*stored_tensors(place.layer, place.kind.parameter)) != entry.sample:
        return [f"{entry.name!r} has other values than the base this adapter was trained on"]
    return []
