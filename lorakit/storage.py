"""Files that are whole or absent, and files by others that are read with suspicion."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.mistaken import check_fetched
from lorakit.safe import Content, once, read_in_order


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never a part.

    Raises:
        LorakitError: it cannot be written; what was there is untouched and nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise LorakitError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory: a new one appears whole; in one that is there, each file is replaced whole.

    Raises:
        LorakitError: it cannot be written; what was there is untouched.
    """
    if path.exists():
        for name, content in files.items():
            write_whole(path / name, content)
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        for name, content in files.items():
            write_whole(beside / name, content)
        try:
            os.replace(beside, path)
        except OSError:
            if not path.is_dir():
                raise
            for name in files:  # another process has made it meanwhile
                os.replace(beside / name, path / name)
        sync_directory(path.parent)
    except OSError as error:
        raise LorakitError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def one_writes(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process is the one to write, of those that hold shards of a tensor; none goes on before it has.

    Every one of them must come here. Where nothing is sharded, each process writes.
    """
    # Of DTensors, whose class is not imported here, since that takes longer than all of lorakit.
    meshes = [mesh for mesh in dict.fromkeys(getattr(tensor, "device_mesh", None) for tensor in tensors) if mesh]
    try:
        yield all(not any(mesh.get_coordinate()) for mesh in meshes)  # the first along each axis
    finally:
        for mesh in meshes:
            for group in mesh.get_all_groups():
                torch.distributed.barrier(group)


def sync_directory(path: Path) -> None:
    """Make a rename survive a power cut, where the system lets a directory be opened."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@torch.inference_mode(False)
def read_tensors(path: Path) -> Content:
    """The tensors and the metadata of a safetensors file, each tensor in memory of its own.

    Raises:
        LorakitError: it is missing, truncated, corrupt, or of another format.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise LorakitError(f"{path} {what}; check the path")
    try:
        return read_in_order(path) or _read_slowly(path.read_bytes())
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, OverflowError) as error:
        raise LorakitError(
            f"{path} is no readable safetensors file, or a damaged one: {error}; save or fetch it again"
        ) from None


def _read_slowly(content: bytes) -> Content:
    tensors = from_safetensors(content)
    size = int.from_bytes(content[:8], "little")  # of the header, which was found to be in order
    header = json.loads(content[8 : 8 + size], object_pairs_hook=once)
    # Copied: alignment could change how a product rounds.
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    return copies, header.get("__metadata__") or {}


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    # A sum is finite only if every number is. It takes a part of the time, and may itself be too large.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def name_of(path: Path) -> str:
    """What an adapter is called: its directory, or its file without the suffixes."""
    name = path.absolute().name
    name = name if path.is_dir() else name.partition(".")[0]
    return re.sub(r"[/\\.\s\x00-\x1f]", "_", name) or "default"


_MOST_TEXT = 2**25


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LorakitError: it is missing or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise LorakitError(f"{path} is not a file; check the path")
        if (size := path.stat().st_size) > _MOST_TEXT:
            raise LorakitError(f"{path} is of {size:,} bytes; no config is so large")
        check_fetched(path)
        return parse_json_object(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise LorakitError(f"cannot read {path}: {error}") from None


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text; `where` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise LorakitError(f"{where} holds no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value
