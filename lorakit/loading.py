"""From a file's content to updates that fit a live model: every check, and no change."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.change import Addition
from lorakit.errors import LorakitError
from lorakit.fingerprint import fingerprint
from lorakit.header import Header, WeightEntry
from lorakit.layers import accumulation_dtype
from lorakit.plan import Plan, plan_of
from lorakit.targets import Index, Place, place_of


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
    additions: list[Addition] = []
    left = dict(tensors)
    if any(parameter.is_meta for parameter in root.parameters()):
        raise LorakitError(f"{where} cannot be loaded: the model is on 'meta'; give it values first")
    index = Index(root)
    if not header.weights:
        problems.append("it adapts no weight")
    for entry in header.weights:
        mine = {
            tensor: (key, left.pop(key, None))
            for tensor, file_name in header.variant.file_names.items()
            for key in [entry.key(file_name)]
        }
        try:
            place = place_of(index, entry.path, entry.parameter, entry.mode)
            problems += _base_problems(place, entry, check_values)
            update = header.variant.build(place.kind, torch.empty_like(place.weight, device="meta"), place.mode)
        except LorakitError as error:
            problems.append(str(error))
            continue
        for tensor, (key, value) in mine.items():
            wanted = getattr(update, tensor)
            found = _tensor_problem(key, value, wanted)
            if found:
                problems.append(found)
            elif value is not None:
                # Copied out of the file's memory, whose alignment could change how a product rounds.
                dtype = value.dtype if header.ours else accumulation_dtype(value.dtype)
                setattr(update, tensor, nn.Parameter(value.to(place.weight.device, dtype, copy=True)))
        dtypes = sorted({str(value.dtype) for _, value in mine.values() if value is not None})
        if len(dtypes) > 1:
            problems.append(f"the tensors of {entry.name!r} are of several dtypes: {', '.join(dtypes)}")
        places.append(place)
        additions.append(Addition(place.layer, place.kind, update))
    problems += [f"it holds {key!r}, which is no part of a {type(header.variant).__name__}" for key in left]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{where} does not fit this {type(root).__name__}:{listed}")
    return plan_of(root, header.variant, places, name), additions


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
