"""Whether a base is that of training in another dtype: models are often stored in 16 bits and trained over in 32."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from lorakit.finetune.base import DTYPES
from lorakit.fingerprint import fingerprint
from lorakit.header import WeightEntry
from lorakit.values.adapter import Adapter


def without_rounded(adapter: Adapter, scheme_of: Callable[[WeightEntry], str | None]) -> tuple[Adapter, str | None]:
    """Leave out what cannot be compared: fingerprints of weights that were quantized in training otherwise than here.

    Args:
        adapter: as it was read.
        scheme_of: how the base's weight is quantized here; None if it is not, or there is none.

    Returns:
        The adapter, whose other weights can still be checked, and what is to be said; None if all can be.
    """
    weights, schemes = [], set()
    for weight in adapter.weights:
        entry = weight.entry
        there = None if _floating(entry.dtype) else entry.dtype
        here = scheme_of(entry) if entry.sample is not None else there
        if there == here:
            weights.append(weight)
            continue
        schemes.add((there, here))
        weights.append(weight._replace(entry=entry._replace(sample=None, full=None)))
    if not schemes:
        return adapter, None
    there, here = (", ".join(sorted({schemes_of[i] or "not quantized" for schemes_of in schemes})) for i in range(2))
    said = (
        f"the base's rounding differs ({there} in training, {here} here), so it cannot be checked that it is the same"
    )
    return adapter.with_weights(weights), said


def _floating(dtype: str | None) -> bool:
    """Whether it is the name of a dtype of floats, or says nothing; else it is how a weight is quantized."""
    found = None if dtype is None else getattr(torch, dtype.removeprefix("torch."), None)
    return dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point)


def in_other_dtype(
    entries: Iterable[WeightEntry], tensor_of: Callable[[WeightEntry], Tensor | None]
) -> Literal["same", "unsure"] | None:
    """Compare fingerprints across dtypes: values here, in the dtype of training, against those of training.

    Args:
        entries: what an adapter's file says of its weights.
        tensor_of: the base's weight that an entry is of; None if there is none, or it is no plain one.

    Returns:
        "same" if nothing but the dtype of some weights differs; "unsure" if some are in a narrower dtype here, so that
        rounding hides whether they were the same; None if no dtype differs, or more than that does.
    """
    differs, rounded = False, False
    for entry in entries:
        here, there = tensor_of(entry), DTYPES.get((entry.dtype or "").removeprefix("torch."))
        if here is None or there is None or entry.sample is None or here.dtype not in DTYPES.values():
            return None
        differs |= here.dtype != there
        if fingerprint(here.detach().to(there)) == entry.sample:
            continue
        if torch.promote_types(here.dtype, there) == here.dtype:
            return None
        rounded = True
    if not differs:
        return None
    return "unsure" if rounded else "same"
