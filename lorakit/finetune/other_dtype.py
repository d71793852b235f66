"""Whether a base is that of training in another dtype: models are often stored in 16 bits and trained over in 32."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from lorakit.finetune.base import DTYPES
from lorakit.fingerprint import fingerprint
from lorakit.header import WeightEntry


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
