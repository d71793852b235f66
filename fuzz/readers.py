"""One input for the readers: a file, a config beside it, and what may come of reading them."""

import os
import resource
import tempfile
import warnings
from pathlib import Path

import torch

import lorakit as lk
from lorakit.values.inspection import inspect

FILES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "adapter_model.bin",
    "lit_model.pth.lora",
    "adapter.gguf",
    "pytorch_lora_weights.safetensors",
)
CONFIGS = ("adapter_config.json", "hyperparameters.yaml")
_BREAK = 4
"""Bytes that say how long the config is."""


def pack(file: str, content: bytes, config: bytes = b"") -> bytes:
    """An input: which file it is, the config and the content."""
    return bytes([FILES.index(file)]) + len(config).to_bytes(_BREAK, "little") + config + content


def unpack(data: bytes) -> tuple[str, bytes, bytes]:
    """The inverse, for any bytes."""
    if len(data) <= _BREAK:
        return FILES[0], b"", data
    size = int.from_bytes(data[1 : 1 + _BREAK], "little") % (len(data) + 1)
    rest = data[1 + _BREAK :]
    return FILES[data[0] % len(FILES)], rest[:size], rest[size:]


def try_one(data: bytes) -> str:
    """Read it. It is refused with a `LorakitError`, or it is an adapter that all else can be done with.

    Returns:
        "refused", or the format. Anything else that happens is a bug, and raises.
    """
    file, config, content = unpack(data)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder)
        (path / file).write_bytes(content)
        if config:
            (path / CONFIGS[file.startswith("lit")]).write_bytes(config)
        try:
            adapter = lk.read(path if file != "adapter.gguf" else path / file)
        except lk.LorakitError:
            return "refused"
        _use(adapter, path / "again.safetensors")
        return adapter.format


def _use(adapter: lk.Adapter, path: Path) -> None:
    """What can be read can be looked at, and what can be written comes back the same."""
    found = inspect(adapter)
    assert found.numbers == adapter.parameters
    if adapter.missing or adapter.naming:
        return
    try:
        lk.write(adapter, path)
    except lk.LorakitError:
        assert found.broken, "only NaN and infinity stand against writing what was read"
        return
    again = lk.read(path)
    assert again.header == adapter.header
    for key, tensor in adapter.state_dict().items():
        other = again.state_dict()[key]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), key


def limit_memory(mib: int) -> None:
    """Make any larger use of memory an error of this process."""
    bound = mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


__all__ = ["CONFIGS", "FILES", "limit_memory", "os", "pack", "try_one", "unpack"]
