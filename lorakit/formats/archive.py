"""Arrays in a zip archive, as `numpy.savez` and MLX write them: `.npz`. Nothing in it is executed or trusted."""

import math
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError

_GROWTH, _FREE = 16, 2**28
"""What is unpacked is at most so many times the file, and 256 MiB more: zeros could be packed a thousandfold."""
_MEMBERS = 2**18


@torch.inference_mode(False)
def read_npz(file: Path) -> dict[str, Tensor]:
    """The tensors of an `.npz` file, by their names.

    Raises:
        LorakitError: it is damaged, unpacks to far more than it is, has a name twice or one that leads elsewhere, or
            holds anything but arrays of numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(file, members)
            return {info.filename.removesuffix(".npy"): _array(file, archive, info) for info in members}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise LorakitError(f"{file} is a damaged archive: {error}; save or fetch it again") from None
    except LorakitError:
        raise
    except Exception as error:  # NumPy reads a header with Python's own parser, which has errors of many kinds
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise LorakitError(f"{file} holds what is no array: {what}; save or fetch it again") from None


def _check_members(file: Path, members: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in members]
    problems = []
    if len(names) > _MEMBERS:
        raise LorakitError(f"{file} holds {len(names)} arrays; no adapter has so many")
    if len(set(names)) != len(names):
        problems.append("names that are there twice")
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or not name.endswith(".npy"):
            problems.append(f"a member {name[:200]!r}")
    total, size = sum(info.file_size for info in members), file.stat().st_size
    if total > _GROWTH * size + _FREE:
        problems.append(f"{size} bytes that unpack to {total}")
    if problems:
        raise LorakitError(f"{file} is no archive that can be trusted: it has {'; '.join(problems[:8])}")


def _array(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """One member. What its header says of its size is compared with the archive's word before it is unpacked."""
    import numpy as np
    from numpy.lib import format as npy

    name = info.filename
    with archive.open(info) as opened:
        version = npy.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name!r} is of version {version}")
        read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(opened)
        if dtype.hasobject or dtype.kind not in "fiub" or dtype.itemsize > 8:
            raise ValueError(f"{name!r} is of dtype {dtype}, not of numbers")
        if not all(isinstance(size, int) and size >= 0 for size in shape) or len(shape) > 16:
            raise ValueError(f"{name!r} has the shape {shape}")
        wanted = math.prod(shape) * dtype.itemsize
        if opened.tell() + wanted != info.file_size:
            raise ValueError(f"{name!r} has {info.file_size} bytes, where its shape {shape} asks for {wanted}")
        content = _exactly(opened, wanted, name)
    array: Any = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="), copy=False)
    array = array.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.array(array, order="C", copy=True))


def _exactly(opened: IO[bytes], wanted: int, name: str) -> bytes:
    """So many bytes and the end, at which the archive compares the checksum."""
    content = opened.read(wanted)
    if len(content) != wanted or opened.read(1):
        raise ValueError(f"{name!r} has another size than it says")
    return content
