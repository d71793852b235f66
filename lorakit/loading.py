"""From a file's content to updates that fit a live model: every check, and no change."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.change import Addition
from lorakit.errors import LorakitError
from lorakit.fingerprint import fingerprint
from lorakit.header import Header, WeightEntry, file_key
from lorakit.index import Index
from lorakit.layers import CalledKind, Update, accumulation_dtype
from lorakit.plan import Plan, plan_of
from lorakit.targets import Place, place_of
from lorakit.variants import LoRA, Variant


@torch.inference_mode(False)
def build_additions(
    root: nn.Module, header: Header, tensors: Mapping[str, Tensor], name: str, *, check_values: bool, where: str
) -> tuple[Plan, list[Addition]]:
    """The updates in a file, built for this model, and the plan of them.

    Raises:
        LorakitError: it does not fit; the message lists everything that is wrong.
    """
    problems: list[str] = []
    places: list[Place] = []
    variants: list[Variant] = []
    additions: list[Addition] = []
    left = dict(tensors)
    if any(parameter.is_meta for parameter in root.parameters()):
        raise LorakitError(f"{where} cannot be loaded: the model is on 'meta'; give it values first")
    index = Index(root)
    if not header.weights:
        problems.append("it adapts no weight")
    for entry in header.weights:
        try:
            place = _place(index, header, entry)
        except LorakitError as error:
            problems.append(str(error))
            for lookup in (False, True):  # whatever it was, its tensors are accounted for
                _take(left, header, entry, lookup)
            continue
        mine = _take(left, header, entry, place.kind.lookup)
        try:
            problems += _base_problems(place, entry, check_values)
            sketch = torch.empty_like(place.weight, device="meta")
            variant = _variant_at(place, header.variant)
            update = variant.build(place.kind, sketch, place.mode)
        except LorakitError as error:
            problems.append(str(error))
            continue
        problems += _fill(update, mine, place, header, entry)
        places.append(place)
        variants.append(variant)
        additions.append(Addition(place.layer, place.kind, update))
    problems += [f"it holds {key!r}, which is no part of a {type(header.variant).__name__}" for key in left]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{where} does not fit this {type(root).__name__}:{listed}")
    return plan_of(root, header.variant, places, name, variants), additions


def _place(index: Index, header: Header, entry: WeightEntry) -> Place:
    """Where an entry is adapted. A file that does not say how, PEFT's, has its dropout on the input of a call."""
    place = place_of(index, entry.path, entry.parameter, entry.mode, entry.slices)
    drops = isinstance(header.variant, LoRA) and header.variant.dropout > 0
    if entry.mode is None and drops and isinstance(place.kind, CalledKind) and place.mode == "weight":
        return replace(place, mode="beside")
    return place


Found = dict[str, tuple[str, Tensor | None]]
"""{name of the tensor in the update: (its key in the file, its value there)}"""


def _take(left: dict[str, Tensor], header: Header, entry: WeightEntry, lookup: bool) -> Found:
    """The tensors of one weight, taken out of those that are left."""
    names = header.variant.file_names
    return {
        tensor: (key, left.pop(key, None))
        for tensor, name in names.items()
        for key in [file_key(entry.path, entry.parameter, name, lookup)]
    }


def _fill(update: Update, mine: Found, place: Place, header: Header, entry: WeightEntry) -> list[str]:
    """Put the tensors of one weight into its update; returns what is wrong with them."""
    problems = []
    for tensor, (key, value) in mine.items():
        problem = _tensor_problem(key, value, getattr(update, tensor))
        if problem:
            problems.append(problem)
        elif value is not None:
            # Copied out of the file's memory, whose alignment could change how a product rounds.
            dtype = value.dtype if header.ours else accumulation_dtype(value.dtype)
            setattr(update, tensor, nn.Parameter(value.to(place.weight.device, dtype, copy=True)))
    dtypes = sorted({str(value.dtype) for _, value in mine.values() if value is not None})
    if len(dtypes) > 1:
        problems.append(f"the tensors of {entry.name!r} are of several dtypes: {', '.join(dtypes)}")
    return problems


def _variant_at(place: Place, variant: Variant) -> Variant:
    """PEFT writes one dropout for all layers and ignores it where inputs are indices; so must who reads its files."""
    return replace(variant, dropout=0.0) if place.kind.lookup and isinstance(variant, LoRA) else variant


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
    weight = place.weight
    if entry.shape is None:
        return []
    if tuple(weight.shape) != entry.shape:
        return [f"{entry.name!r} is {tuple(weight.shape)} here and was {entry.shape} when saved"]
    if not check_values or entry.sample is None or weight.is_meta:
        return []
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype != entry.dtype:
        return [
            f"{entry.name!r} is {dtype} here and was {entry.dtype} when saved; if this is the same base in another "
            "dtype, use verify='off'"
        ]
    if fingerprint(weight) != entry.sample:
        return [f"{entry.name!r} has other values than the base this adapter was trained on"]
    return []
