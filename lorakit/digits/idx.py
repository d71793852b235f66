"""The IDX format, in which MNIST comes: a big-endian header of sizes, then bytes.

    00 00 08 n | n sizes of 4 bytes each | product of the sizes bytes

08 is the code for unsigned bytes, the only ones read here. The format is described at the foot of MNIST's home page
(LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lorakit.errors import LorakitError

_MOST_BYTES = 1 << 30
_MOST_SIZES = 8
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTES = b"\x00\x00\x08"


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The array in an IDX file of unsigned bytes, gzip-compressed or plain, told apart by the first two bytes.

    Memory is bounded by the sizes in the header (at most 1 GiB) and by what the file holds, whichever is less.

    Returns:
        uint8, shaped as the header says: (n, 28, 28) for MNIST's images, (n,) for its labels.

    Raises:
        LorakitError: the file is missing, unreadable, of another type, cut short, too long, or corrupt.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "it is a directory" if os.path.isdir(path) else "there is no such file"
        raise LorakitError(f"cannot read '{path}': {what}; give the path of an IDX file")
    try:
        with open(path, "rb") as raw:
            packed = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            if not packed:
                return _read(raw, path)
            with gzip.open(raw) as unpacked:
                return _read(unpacked, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        _refuse(path, f"its gzip compression is damaged ({error})", error)
    except OSError as error:
        reason = error.strerror or error
        raise LorakitError(f"cannot read '{path}': {reason}; check its permissions and its disk") from error


def _read(file: io.BufferedIOBase, path: Path) -> Tensor:
    magic = file.read(4)
    if not magic:
        _refuse(path, "it is empty")
    if len(magic) < 4 or magic[:3] != _UNSIGNED_BYTES:
        _refuse(path, f"it starts with {magic.hex(' ')}, not with {_UNSIGNED_BYTES.hex(' ')} (IDX of unsigned bytes)")
    if magic[3] > _MOST_SIZES:
        _refuse(path, f"its header announces {magic[3]} dimensions; at most {_MOST_SIZES} are read")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        _refuse(path, "it ends within its header")
    sizes = struct.unpack(f">{magic[3]}I", header)
    # A size of 0 must not hide the others from the bound: strides are products too.
    if math.prod(max(size, 1) for size in sizes) > _MOST_BYTES:
        _refuse(path, f"its header announces {'×'.join(map(str, sizes))} bytes; at most {_MOST_BYTES:,} are read")
    need = math.prod(sizes)
    data = _read_up_to(file, need + 1)  # one more: to see what is too long, and to make gzip check its checksum
    if len(data) < need:
        _refuse(path, f"it holds {len(data):,} of the {need:,} bytes that its header announces")
    if len(data) > need:
        _refuse(path, f"it holds more than the {need:,} bytes that its header announces")
    # frombuffer refuses an empty buffer
    return torch.frombuffer(data, dtype=torch.uint8).reshape(sizes) if need else torch.empty(sizes, dtype=torch.uint8)


def _read_up_to(file: io.BufferedIOBase, limit: int) -> bytearray:
    """In chunks, since `read(limit)` would allocate what a lying header asks for before reading a byte."""
    data = bytearray()
    while len(data) < limit and (chunk := file.read(min(_CHUNK, limit - len(data)))):
        data += chunk
    return data


def _refuse(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise LorakitError(
        f"cannot read '{path}': {what}; delete it and run again to download it, or put the original in its place"
    ) from cause
