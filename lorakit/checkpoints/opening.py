"""From a path to a checkpoint: one file, an index with its shards, or a directory. Nothing there is trusted."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.checkpoints.checkpoint import Checkpoint, Part, check, in_memory
from lorakit.checkpoints.shards import Stored, read_shard
from lorakit.errors import LorakitError
from lorakit.mistaken import check_fetched
from lorakit.state import find_root
from lorakit.storage import read_json_object

TORCH = (".pt", ".pth", ".bin")
_FIRST = ("model", "diffusion_pytorch_model", "pytorch_model")
"""The names that transformers and diffusers look for, in this order."""
_LONGEST = 200
"""Characters of a shard's name: systems have none longer, and say so by an error of their own."""


Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Checkpoint
"""What a checkpoint can be given as."""


class _Opened(NamedTuple):
    """One file of weights."""

    part: Part
    tensors: Mapping[str, Stored]
    aliases: Mapping[str, str]
    memory: Mapping[str, Tensor]


def open_checkpoint(source: Source, what: str = "the checkpoint") -> Checkpoint:
    """A checkpoint by its names, shapes and dtypes; values are not read.

    Args:
        source: one of
            - a safetensors file, or one of torch (`.pt`, `.pth`, `.bin`), of which no code is ever run;
            - a directory with an index and its shards, as transformers and diffusers save them, or with one or several
              such files; or the index itself;
            - a mapping of names to tensors, or an `nn.Module`, whose state dict it is.
        what: what errors call a mapping or module.

    Raises:
        LorakitError: it is missing, damaged, or names files outside of its directory: all problems in one error.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        if find_root(source) is not None:
            raise LorakitError(f"{what} is a model with adapters: merge or detach them first, or give its base alone")
        return in_memory(source.state_dict(), f"{what} (a {type(source).__name__})", source)
    if isinstance(source, Mapping):
        return in_memory(source, what)
    if not isinstance(source, str | os.PathLike):
        raise LorakitError(f"{what} is a {type(source).__name__}; give a path, a mapping of tensors or an nn.Module")
    return _open_path(Path(source))


def _open_path(path: Path) -> Checkpoint:
    """The checkpoint in a file or directory.

    Raises:
        LorakitError: there is none, or a damaged one.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise LorakitError(f"{path} does not exist; check the path")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    found = _open_file(path)
    check(os.fspath(path), [], found.tensors)
    return Checkpoint(os.fspath(path), found.tensors, (found.part,), memory=found.memory, aliases=found.aliases)


def _open_directory(path: Path) -> Checkpoint:
    """By its index if there is one, else by the file of the usual name, else all safetensors files together."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    for kind, suffixes in (("safetensors", (".safetensors",)), ("bin", TORCH)):
        indices = [name for name in names if name.endswith(f".{kind}.index.json")]
        weights = [name for name in names if name.endswith(suffixes) and not name.startswith(("adapter_model.", "."))]
        usual = [f"{first}.{kind}.index.json" for first in _FIRST if f"{first}.{kind}.index.json" in indices]
        if usual or len(indices) == 1:
            return _open_index(path / (usual or indices)[0])
        single = [f"{first}.{kind}" for first in _FIRST if f"{first}.{kind}" in weights]
        if indices and not single:
            raise LorakitError(f"{path} has several indices, {', '.join(indices)}: name one of them")
        chosen = single[:1] or weights
        if kind == "bin" and len(chosen) > 1:
            raise LorakitError(
                f"{path} has several files of torch, {', '.join(chosen)}, and no index: name one of them"
            )
        if chosen:
            return _together(path, [path / name for name in chosen])
    raise LorakitError(f"{path} holds no *.safetensors and no torch file: name the directory of the model itself")


def _open_index(path: Path) -> Checkpoint:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LorakitError(f"{path} has no weight_map; save the model again")
    files = []
    odd = [name for name, file in weight_map.items() if not isinstance(file, str) or len(file) > _LONGEST]
    problems = [f"it has {name!r} in what is no name of a file" for name in odd]
    for name in dict.fromkeys(file for file in weight_map.values() if isinstance(file, str) and len(file) <= _LONGEST):
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            problems.append(f"it names the file {name!r}, which is not in its directory")
        elif not (path.parent / name).is_file():
            problems.append(f"the file {name!r} is missing")
        else:
            files.append(path.parent / name)
    check(os.fspath(path), problems, files)
    return _together(path.parent, files, path.name, weight_map)


def _together(
    folder: Path, files: list[Path], index: str | None = None, weight_map: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Several files as one checkpoint, checked to be what the index says."""
    opened, problems = [], []
    for file in files:
        try:
            opened.append(_open_file(file))
        except LorakitError as error:
            problems.append(str(error))
    tensors: dict[str, Stored] = {}
    owner: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for found in opened:
        aliases |= found.aliases
        for name, stored in found.tensors.items():
            if name in owner:
                problems.append(f"{name!r} is in {owner[name]} and in {found.part.source}: name the file that is meant")
            tensors[name], owner[name] = stored, found.part.source or found.part.name
    if weight_map is not None and not problems:
        for name, file in weight_map.items():
            if owner.get(name) != file:
                problems.append(f"the index has {name!r} in {file}, and it is in {owner.get(name, 'no shard')}")
        problems += [
            f"{name!r} is in {owner[name]}, and not in the index" for name in tensors if name not in weight_map
        ]
    check(os.fspath(folder), problems, tensors)
    memory = {name: tensor for found in opened for name, tensor in found.memory.items()}
    parts = tuple(found.part for found in opened)
    aliases = {name: kept for name, kept in aliases.items() if name not in tensors and kept in tensors}
    return Checkpoint(os.fspath(folder), tensors, parts, folder, index, memory, aliases=aliases)


def _open_file(path: Path) -> _Opened:
    if not path.is_file():  # a pipe would be waited for
        raise LorakitError(f"{path} is not a file; check the path")
    check_fetched(path)
    if path.suffix in TORCH:
        return _open_torch(path)
    shard = read_shard(path)
    # safetensors' save_model stores one of several names, and says here which one the others are.
    kept = {
        name: other for name, other in shard.metadata.items() if name not in shard.tensors and other in shard.tensors
    }
    return _Opened(Part(path.name, tuple(shard.tensors), shard, path.name), shard.tensors, kept, {})


def _open_torch(path: Path) -> _Opened:
    """A file of `torch.save`: from a new one places alone are taken, an old one is read."""
    renamed = path.with_suffix(".safetensors").name.replace("pytorch_model", "model")
    zipped = False
    try:
        zipped = zipfile.is_zipfile(path)  # of some damaged ones it raises
        _check_order(path, zipped)
        content = torch.load(path, map_location="meta" if zipped else "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle may raise
        what = f"{type(error).__name__} {error}".splitlines()[0]
        raise LorakitError(
            f"{path} is no file of tensors by torch.save, or a damaged one: {what}; if it holds "
            "more than tensors, load it yourself and give the mapping"
        ) from None
    if not isinstance(content, Mapping):
        raise LorakitError(
            f"{path} holds a {type(content).__name__}, not a mapping of tensors: give the mapping itself"
        )
    if not zipped:
        held = in_memory(content, os.fspath(path))
        return _Opened(Part(renamed, tuple(held.tensors), None, path.name), held.tensors, {}, held.memory)
    total, problems, found = path.stat().st_size, [], {}
    for name, tensor in content.items():
        try:
            found[name] = _placed(name, tensor, path, total)
        except ValueError as error:
            problems.append(f"{name!r} {error}")
    check(os.fspath(path), problems, found)
    return _Opened(Part(renamed, tuple(found), None, path.name), found, {}, {})


def _check_order(path: Path, zipped: bool) -> None:
    """Bytes are taken from the file as they are, so they must be in this machine's order and not compressed."""
    if not zipped:
        return
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.filename.endswith("/byteorder") and entry.file_size < 16 and file.read(entry) != b"little":
                raise ValueError("its bytes are in another order than this machine's")


def _placed(name: object, tensor: object, path: Path, total: int) -> Stored:
    """Where a tensor lies that was loaded without values."""
    if not isinstance(name, str):
        raise ValueError("is no text")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"is a {type(tensor).__name__}, not a tensor; give the mapping of tensors in it")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"is {tensor.layout}, {tensor.dtype}; only plain tensors can be read")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not isinstance(start, int):
        raise ValueError("has no place in the file; load the file and give the mapping")
    size = tensor.dtype.itemsize
    begin = start + int(tensor.storage_offset()) * size
    spread = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    reach = begin + spread * size if tensor.numel() else begin
    end = start + tensor.untyped_storage().nbytes()
    if not 0 <= start <= reach <= min(end, total) or tensor.numel() > spread or len(tensor.shape) > 16:
        raise ValueError(f"of shape {tuple(tensor.shape)} reaches beyond its {total} bytes, or is larger than they are")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Stored(tuple(tensor.shape), tensor.dtype, path, begin, strides)
