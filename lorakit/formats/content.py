"""What lies in a file, before anyone asks what it means: tensors, metadata, and the config beside it."""

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.checkpoints.shards import read_shard
from lorakit.errors import LorakitError, UnknownFormatError
from lorakit.formats.archive import read_npz
from lorakit.formats.gguf_file import read_gguf
from lorakit.formats.pickled import read_pickled
from lorakit.formats.sharded import read_shards
from lorakit.mistaken import as_text, check_fetched
from lorakit.patterns import some
from lorakit.storage import read_json_object, read_tensors

Container = Literal["safetensors", "torch", "npz", "gguf"]

NAMES = (
    *("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors"),
    *("adapter_model.bin", "adapters.npz", "lit_model.pth.lora", "pytorch_lora_weights.bin"),
    "adapter_model.pt",
)
"""What the file with the tensors is called in a directory."""
_NUMBERED = re.compile(r"\d{7}_adapters\.(safetensors|npz)|adapter_\d{1,6}\.(safetensors|bin|pt)")
"""What mlx-lm and torchtune call the states of a run, which share one config."""
_SUFFIXES = (".safetensors", ".npz", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
CONFIGS = ("adapter_config.json", "hyperparameters.yaml")
"""What lies beside it and says what they mean."""

_LARGE = 2**26
"""Bytes of a file whose header is looked at before its values."""
_MOST_TEXT, _MOST_VALUES, _DIGITS = 2**16, 10_000, 300
"""Of a config in YAML, whose parser takes seconds for a megabyte: bytes, values, and digits of a number."""


class Content(NamedTuple):
    """A file's content."""

    path: Path
    """What was asked for: the file, or the directory it lies in."""
    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    """The config beside it, if there is one that belongs to it."""
    container: Container


def read_content(path: Path, accept: Callable[[Content], object] | None = None) -> Content:
    """All that a file holds, or the one file with tensors in a directory.

    `accept` is asked before the values of a large file are read, with tensors that have none, and may raise: a
    checkpoint can be larger than any memory, and its keys say already that it is no adapter.

    Raises:
        LorakitError: there is none, or it is damaged.
    """
    if path.is_dir() and not any((path / name).is_file() for name in NAMES):
        sharded = read_shards(path)
        if sharded is not None:
            config = path / CONFIGS[0]
            given = read_json_object(config) if config.is_file() else None
            return Content(path, sharded.first, sharded.tensors, {}, given, "safetensors")
    file = _file(path)
    if not file.is_file():  # a pipe would be waited for
        raise LorakitError(f"{file} is not a file; check the path")
    path = file.parent if path.is_dir() else path
    container = _container(file)
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = {}
    if container == "safetensors":
        if accept is not None and file.stat().st_size >= _LARGE and (outline := _outline(path, file)) is not None:
            accept(outline)
        tensors, metadata = read_tensors(file)
    elif container == "torch":
        tensors = read_pickled(file)
    elif container == "npz":
        tensors = read_npz(file)
    else:
        tensors, metadata = read_gguf(file)
    return Content(path, file, tensors, metadata, _config(file), container)


def _outline(path: Path, file: Path) -> Content | None:
    """What the header of a safetensors file says, with tensors that have no values; None if it is not in order."""
    try:
        shard = read_shard(file)
    except LorakitError:
        return None  # whoever reads the values says what is wrong
    tensors = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in shard.tensors.items()
    }
    return Content(path, file, tensors, shard.metadata, _config(file), "safetensors")


def _file(path: Path) -> Path:
    if not path.exists():
        raise LorakitError(f"{path} does not exist; check the path")
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()] or sorted(path.glob("*.gguf"))
    if not found:  # PEFT saves an adapter of another name than "default" in a directory of that name
        below = sorted(child for child in path.iterdir() if any((child / name).is_file() for name in NAMES))
        if len(below) == 1:
            return _file(below[0])
        what = f"; {some([child.name for child in below])} in it do: name the one that is meant" if below else ""
        others = [child.name for child in sorted(path.iterdir()) if child.suffix in _SUFFIXES]
        if not below and others:
            what = f"; it holds {some(others)}: name the one that is meant"
        elif not below and (path / CONFIGS[0]).is_file():
            what = f": its {CONFIGS[0]} lies there without the tensors; fetch them, too"
        raise UnknownFormatError(f"{path} holds none of {', '.join(NAMES)}{what or '; name the file itself'}")
    if len(found) > 1 and found[0].stem != found[1].stem:  # .bin beside .safetensors is the same, kept for old readers
        raise LorakitError(f"{path} holds {' and '.join(file.name for file in found)}: name the one that is meant")
    return found[0]


def _container(file: Path) -> Container:
    check_fetched(file)
    try:
        with file.open("rb") as opened:
            start, size = opened.read(9), os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise LorakitError(f"cannot read {file}: {error.strerror or error}") from None
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"  # the size of the header, which is JSON
    if start[:4] == b"GGUF":
        return "gguf"
    if (text := as_text(file)) is not None:
        raise UnknownFormatError(f"{file} is a text, {text!r}, and holds no tensors: save or fetch it again")
    if start[:2] == b"PK":
        return "npz" if _members_are_arrays(file) else "torch"
    if start[:1] == b"\x80" or file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".lora"):
        return "torch"
    return "safetensors"  # it is not, and its reader says why


def _members_are_arrays(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise LorakitError(f"{file} is a damaged zip archive: {error}; save or fetch it again") from None
    arrays = all(name.endswith(".npy") for name in names)
    if not arrays and not any(name.endswith("data.pkl") for name in names):
        raise LorakitError(f"{file} is a zip archive of {some(names)}: unpack it first, and name what was in it")
    return arrays


def _config(file: Path) -> Mapping[str, Any] | None:
    for name in CONFIGS:
        config = file.with_name(name)
        known = file.name in NAMES or _NUMBERED.fullmatch(file.name) or name.endswith(".yaml")
        if not config.is_file() or not known:
            continue
        return read_yaml(config) if name.endswith(".yaml") else read_json_object(config)
    return None


def read_yaml(file: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        LorakitError: it is damaged, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise LorakitError(f"reading {file} needs PyYAML: pip install 'lorakit[formats]'") from None
    try:
        if (size := file.stat().st_size) > _MOST_TEXT:
            raise LorakitError(f"{file} is of {size:,} bytes; no config is so large")
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None:
            _weigh(node, {})
        loaded = {} if node is None else loader.construct_document(node)
    except LorakitError:
        raise
    except (yaml.YAMLError, OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise LorakitError(f"{file} holds no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, Mapping):
        raise LorakitError(f"{file} must hold a mapping, not {type(loaded).__name__}")
    return loaded


def _weigh(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for: references to references grow exponentially when they are followed.

    Raises:
        ValueError: they are too many, a node lies in itself, a key is there twice, or a number is absurdly long.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("a value lies in itself")
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node.value, list) else []
    if parts and isinstance(parts[0], tuple):
        keys = [(key.tag, key.value) for key, _ in parts if isinstance(key.value, str)]
        if len(set(keys)) != len(keys):
            raise ValueError("a key is there twice")
        parts = [part for pair in parts for part in pair]
    elif not parts and node.tag.endswith(":int") and len(node.value) > _DIGITS:
        raise ValueError(f"a number has {len(node.value)} digits")
    size = 1 + sum(_weigh(part, known) for part in parts)
    if size > _MOST_VALUES:
        raise ValueError(f"it stands for more than {_MOST_VALUES} values")
    known[id(node)] = size
    return size
