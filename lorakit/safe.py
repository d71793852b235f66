"""Safetensors files of floats, read straight into memory that torch allocates, and written alike every time.

A file is eight bytes (the size of the header, little-endian), the header (JSON: each tensor's dtype, shape and place)
and the tensors, one after the other.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Content = tuple[dict[str, Tensor], dict[str, str]]
"""The tensors and the metadata of a file."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST = 2**26
"""Bytes of a header; a larger one is left to the library."""


def read_in_order(path: Path) -> Content | None:
    """What the file holds, each tensor in memory of its own; None unless all of it is plainly in order.

    What is not is for the library to judge, which knows every case and words the error.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(total - 8, _MOST):
            return None
        try:
            header = json.loads(file.read(size).decode(), object_pairs_hook=once)
        except (ValueError, RecursionError):
            return None
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            return None
        plans = _layout(header, total - 8 - size)
        if plans is None:
            return None
        tensors = {}
        for key, shape, dtype in plans:
            tensors[key] = tensor = torch.empty(shape, dtype=dtype, device="cpu")
            memory: Any = (tensor.view(torch.int16) if dtype is torch.bfloat16 else tensor).numpy()
            if file.readinto(memory.reshape(-1)) != memory.nbytes:
                return None
        return tensors, metadata


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads`, which would take the last of several without a word.

    Raises:
        ValueError: one name is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it holds {twice[:200]!r} twice")
    return found


def _layout(header: dict[str, Any], size: int) -> list[tuple[str, list[int], torch.dtype]] | None:
    """Each tensor's name, shape and dtype in the order of the file; None unless they fill all of its bytes."""
    found = []
    for key, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            return None
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = isinstance(dtype, str) and dtype in _DTYPES and isinstance(shape, list) and isinstance(place, list)
        if (
            not known
            or len(place) != 2
            or len(shape) > 16
            or not all(type(number) is int and number >= 0 for number in (*shape, *place))
        ):
            return None
        found.append((*place, key, shape, _DTYPES[dtype]))
    found.sort()
    reached = 0
    for begin, end, _, shape, dtype in found:
        if begin != reached or begin == end or end - begin != math.prod(shape) * dtype.itemsize:
            return None
        reached = end
    return [each[2:] for each in found] if reached == size else None


def in_order(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file of these tensors, of at least 16 bits each: the same content makes the same bytes.

    The library writes metadata in another order each time. Larger dtypes come first, so that all are aligned.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts, end = [], 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        memory = (flat.view(torch.int16) if flat.dtype is torch.bfloat16 else flat).numpy().tobytes()
        begin, end = end, end + len(memory)
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(memory)
    return b"".join([framed(header), *parts])


def framed(header: Mapping[str, Any]) -> bytes:
    """The beginning of a file with this header: its size, and the JSON, filled up so that the values are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
