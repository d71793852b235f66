"""Devices by name, and the dtype that each computes in."""

import os

import torch

from lorakit.errors import LorakitError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_named(device: str) -> torch.device:
    """The device of that name; of "auto" the best there is.

    Raises:
        LorakitError: the name is none, or there is no such device.
    """
    if device == "auto":
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(kind for kind, there in kinds.items() if there)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise LorakitError(f"{device!r} is no device; auto, cpu, cuda, cuda:1 and mps are") from None
    if place.type == "cpu":
        return torch.device("cpu")
    backend = getattr(torch, place.type, None) if place.type != "mps" else torch.backends.mps
    there = getattr(backend, "is_available", None)
    if there is None or not there():
        built = " (this torch is built for CPUs alone)" if place.type == "cuda" and torch.version.cuda is None else ""
        raise LorakitError(f"there is no {place.type} device here{built}: give cpu, or auto for what there is")
    if place.type == "mps":
        return place
    number = int(os.environ.get("LOCAL_RANK") or 0) if place.index is None else place.index
    count = backend.device_count()  # type: ignore[union-attr]
    if number >= count:
        raise LorakitError(f"there is no {place.type}:{number} here: the devices are 0 to {count - 1}")
    return torch.device(place.type, number)


def dtype_on(place: torch.device) -> torch.dtype:
    """What "auto" is there: bfloat16 where it is computed in; else float32, as float16 overflows in training."""
    if place.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if place.type == "xpu" else torch.float32
