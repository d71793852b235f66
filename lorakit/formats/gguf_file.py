"""GGUF, the container of llama.cpp: a header of typed values, a table of tensors, and their data, aligned.

Read with bounds of our own: every count and size is compared with what is left of the file before anything of that size
is made, so that a damaged header costs no more than a whole one. Layout: the specification in ggml's docs/gguf.md.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError

Value = str | int | float | bool
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_ALIGNMENT = 32
_LONGEST = 2**24
"""Bytes of one text."""
_MOST = 2**20
"""Tensors, and values in the header."""


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Header:
    """The part of a file before the data."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: the file has no such number left.
        """
        if count > self.left:
            raise ValueError(f"{count} bytes are announced where {self.left} are left")
        self.left -= count
        content = self.file.read(count)
        if len(content) != count:
            raise ValueError("the file ends too early")
        return content

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        size = self.number("<Q")
        if size > _LONGEST:
            raise ValueError(f"a text of {size} bytes is announced")
        return self.take(size).decode("utf-8")

    def value(self) -> Value:
        """A value; of an array, how many it has."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            found: Value = self.number(_SCALARS[kind])
            return found
        if kind != _ARRAY:
            raise ValueError(f"a value is of the type {kind}, which there is not")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING and count <= self.left // 8:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"an array of {count} values of the type {inner} is announced")
        return f"array of {count}"

    def skip(self, count: int) -> None:
        if count > self.left:
            raise ValueError(f"{count} bytes are announced where {self.left} are left")
        self.left -= count
        self.file.seek(count, os.SEEK_CUR)


@torch.inference_mode(False)
def read_gguf(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, with their axes in torch's order, and the header's values as JSON; of an array only its size.

    Quantized tensors are dequantized by the `gguf` package, to float32.

    Raises:
        LorakitError: it is damaged, of another byte order or version, or a tensor is quantized and the package is not
            there.
    """
    try:
        with file.open("rb") as opened:
            return _read(opened, str(file))
    except (ValueError, OSError, struct.error, OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, LorakitError):
            raise
        raise LorakitError(f"{file} is a damaged GGUF file: {error}; save or fetch it again") from None


def _read(opened: BinaryIO, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = _Header(opened)
    size = header.left
    if header.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = header.number("<I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise ValueError("it is of the other byte order" if swapped else f"it is of version {version}")
    tensors, values = header.number("<Q"), header.number("<Q")
    if tensors > min(_MOST, header.left // 24) or values > min(_MOST, header.left // 13):
        raise ValueError(f"{tensors} tensors and {values} values are announced in {size} bytes")
    metadata: dict[str, Value] = {}
    for _ in range(values):
        key = header.text()
        if key in metadata:
            raise ValueError(f"{key[:200]!r} is there twice")
        metadata[key] = header.value()
    entries = [_entry(header) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-(size - header.left) // alignment) * alignment
    return _tensors(opened, entries, start, size, where), {key: json.dumps(value) for key, value in metadata.items()}


def _entry(header: _Header) -> _Entry:
    name, axes = header.text(), header.number("<I")
    if not 1 <= axes <= 4:
        raise ValueError(f"{name[:200]!r} has {axes} axes")
    shape = tuple(header.number("<Q") for _ in range(axes))
    if math.prod(shape) > 2**48:
        raise ValueError(f"{name[:200]!r} has the shape {shape}")
    return _Entry(name, shape[::-1], header.number("<I"), header.number("<Q"))


def _tensors(opened: BinaryIO, entries: list[_Entry], start: int, size: int, where: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    left = size - start
    for entry in entries:
        if entry.name in found:
            raise ValueError(f"{entry.name[:200]!r} is there twice")
        count = _bytes_of(entry, where)
        # The sum too: tensors that share their bytes would be more than the file.
        if entry.offset + count > size - start or count > left:
            raise ValueError(f"{entry.name[:200]!r} of {count} bytes reaches beyond its end")
        left -= count
        opened.seek(start + entry.offset)
        found[entry.name] = _tensor(opened.read(count), entry)
    return found


def _bytes_of(entry: _Entry, where: str) -> int:
    dtype = _DTYPES.get(entry.type)
    if dtype is not None:
        return math.prod(entry.shape) * dtype.itemsize
    gguf = package(f"{where}: {entry.name[:200]!r} is quantized; reading it")
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type)]
    except (ValueError, KeyError):
        raise ValueError(f"{entry.name[:200]!r} is of the type {entry.type}, which is not known") from None
    if entry.shape[-1] % block:
        raise ValueError(f"{entry.name[:200]!r}: rows of {entry.shape[-1]} are no blocks of {block}")
    return int(math.prod(entry.shape) // block * size)


def _tensor(content: bytes, entry: _Entry) -> Tensor:
    dtype = _DTYPES.get(entry.type)
    if dtype is not None:
        if not content:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype).view(entry.shape).clone()
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(entry.type)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        raw = np.frombuffer(content, np.uint8).reshape(*entry.shape[:-1], entry.shape[-1] // block * size)
        values = gguf.quants.dequantize(raw, kind)
    except (NotImplementedError, KeyError, IndexError) as error:
        raise ValueError(f"{entry.name[:200]!r}: {kind.name} cannot be dequantized: {error}") from None
    return torch.from_numpy(np.array(values, np.float32)).view(entry.shape)


def package(why: str) -> Any:
    """The `gguf` package.

    Raises:
        LorakitError: it is not installed; `why` says what needs it.
    """
    try:
        import gguf
    except ImportError:
        raise LorakitError(f"{why} needs the gguf package: pip install 'lorakit[formats]'") from None
    return gguf


def gguf_bytes(values: Mapping[str, str | float], tensors: Mapping[str, Tensor]) -> bytes:
    """A GGUF file of these texts and 32-bit floats, and of these tensors, of 16 or 32 bits."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        is_text = isinstance(value, str)
        head += [_text(key), struct.pack("<I", _STRING if is_text else 6)]
        head.append(_text(value) if isinstance(value, str) else struct.pack("<f", value))
    data: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        shape = tuple(tensor.shape)[::-1]
        head += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPES[tensor.dtype], offset)]
        padding = -len(content) % _ALIGNMENT
        data += [content, bytes(padding)]
        offset += len(content) + padding
    whole = b"".join(head)
    return b"".join([whole, bytes(-len(whole) % _ALIGNMENT), *data])


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
