"""One safetensors file by its header: which tensors lie where. No values are read, and nothing in it is trusted."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.errors import LorakitError
from lorakit.safe import framed, once

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES: Mapping[str, torch.dtype] = {
    name: found for name, own in _NAMES.items() if isinstance(found := getattr(torch, own, None), torch.dtype)
}
"""torch's dtypes by their names in safetensors."""

_MOST = 100 * 2**20
"""Bytes of a header; the library reads no longer one either."""
_AXES, _LONGEST = 16, 2**40


class Stored(NamedTuple):
    """One tensor's shape, dtype and place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None
    """The file that holds it; None if it is in memory."""
    begin: int = 0
    """Where its bytes begin in the file."""
    strides: tuple[int, ...] | None = None
    """How its numbers lie there, if it is not one after the other."""

    @property
    def bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A safetensors file without its values."""

    head: bytes
    """The eight bytes of the size, and the header as it stands in the file."""
    tensors: Mapping[str, Stored]
    """In the order of their bytes, which fill the rest of the file without a gap."""
    metadata: Mapping[str, str]


def read_shard(path: Path) -> Shard:
    """What a safetensors file says it holds, checked against its size.

    Raises:
        LorakitError: it is missing, truncated or damaged, holds one name twice, or a dtype that torch does not have.
    """
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(total - 8, _MOST):
                raise LorakitError(f"{path} is no safetensors file, or truncated: {total} bytes, a header of {size}")
            text = file.read(size)
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no mapping of texts")
        tensors = _placed(header, path, 8 + size, total)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LorakitError(f"{path} is a damaged safetensors file: {error}; save or fetch it again") from None
    return Shard(size.to_bytes(8, "little") + text, tensors, metadata)


def head_of(tensors: Iterable[tuple[str, Stored]], metadata: Mapping[str, str]) -> Shard:
    """A new file's header for tensors in this order, and each tensor's place in it."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, problems, reached = {}, [], 0
    for name, stored in tensors:
        if stored.dtype not in words:
            problems.append(f"{name!r} is {stored.dtype}, which safetensors has no name for")
            continue
        end = reached + stored.bytes
        header[name] = {
            "dtype": words[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [reached, end],
        }
        places[name] = stored._replace(begin=reached)
        reached = end
    if problems:
        raise LorakitError("\n  - ".join(["cannot be written as safetensors:", *problems]))
    head = framed(header)
    moved = {name: stored._replace(begin=len(head) + stored.begin) for name, stored in places.items()}
    return Shard(head, moved, metadata)


def _placed(header: dict[str, Any], path: Path, start: int, total: int) -> dict[str, Stored]:
    """Each tensor's place in the file, in the order of the bytes."""
    found = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} has no dtype, shape and place, or more than these")
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name!r} is of dtype {dtype!r}, which torch does not have")
        if not _sizes(shape, _AXES) or not _sizes(place, 2) or len(place) != 2:
            raise ValueError(f"{name!r} has shape {shape!r} at {place!r}, which are no sizes")
        stored = Stored(tuple(shape), DTYPES[dtype], path, start + place[0])
        if place[1] - place[0] != stored.bytes:
            raise ValueError(
                f"{name!r} of shape {shape} and dtype {dtype} is at bytes {place[0]} to {place[1]}, not {stored.bytes}"
            )
        found.append((place[0], place[1], name, stored))
    found.sort(key=lambda each: each[:2])
    reached = 0
    for begin, end, name, _ in found:
        if begin != reached:
            raise ValueError(
                f"{name!r} begins at byte {begin}, where {reached} is next: tensors overlap or leave a gap"
            )
        reached = end
    if start + reached != total:
        raise ValueError(f"its tensors end at byte {start + reached} of {total}: it is truncated, or longer")
    return {name: stored for _, _, name, stored in found}


def _sizes(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(number) is int and 0 <= number <= _LONGEST for number in value)
    )
