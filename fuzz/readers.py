"""One input for the readers: the files of a directory, and what may come of reading them."""

import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import lorakit as lk
from fuzz.models import model
from lorakit.checkpoints.opening import open_checkpoint
from lorakit.values.inspection import inspect

FILES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "adapter_model.bin",
    "lit_model.pth.lora",
    "adapter.gguf",
    "pytorch_lora_weights.safetensors",
    "adapter_config.json",
    "hyperparameters.yaml",
    "model_config.yaml",
    "model.safetensors.index.json",
    "model-1.safetensors",
    "model-2.safetensors",
    "pytorch_model.bin",
    "adapter_model.pt",
)
CHECKPOINTS = ("model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "pytorch_model.bin")
_BREAK = 4
"""Bytes that say how long a file is."""
_SECONDS = 10.0


def pack(files: dict[str, bytes]) -> bytes:
    """An input: each file's number, size and content."""
    return b"".join(
        bytes([FILES.index(name)]) + len(content).to_bytes(_BREAK, "little") + content
        for name, content in files.items()
    )


def unpack(data: bytes) -> dict[str, bytes]:
    """The inverse, for any bytes: what is left at the end is the last file."""
    found = {}
    while data:
        name, size = FILES[data[0] % len(FILES)], int.from_bytes(data[1 : 1 + _BREAK], "little")
        found[name] = data[1 + _BREAK : 1 + _BREAK + size]
        data = data[1 + _BREAK + size :]
    return found


def try_one(data: bytes) -> str:
    """Read it. It is refused with a `LorakitError`, or it is an adapter that all else can be done with.

    Returns:
        "refused", or the format, or "checkpoint". Anything else that happens is a bug, and raises.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, files = Path(folder), unpack(data)
        for name, content in files.items():
            (path / name).write_bytes(content)
        found = _checkpoint(path) if files.keys() & set(CHECKPOINTS) else _adapter(path)
    assert time.monotonic() - start < _SECONDS, "it takes too long"
    return found


def _adapter(path: Path) -> str:
    try:
        adapter = lk.read(path)
    except lk.LorakitError as error:
        check_message(error)
        _load(path, None)
        return "refused"
    _use(adapter, path / "again.safetensors")
    _load(path, adapter)
    return adapter.format


def _checkpoint(path: Path) -> str:
    try:
        found = open_checkpoint(path)
        for name in found:
            assert found.read(name).shape == found[name].shape
    except lk.LorakitError as error:
        check_message(error)
        return "refused"
    return "checkpoint"


def check_message(error: lk.LorakitError) -> None:
    """A person can read it: it is no flood, and nothing in it acts on a terminal."""
    text = str(error)
    assert len(text) < 30_000, f"an error of {len(text)} characters"
    assert all(c.isprintable() or c in "\n" for c in text), f"control characters: {text[:2000]!a}"


def _use(adapter: lk.Adapter, path: Path) -> None:
    """What can be read can be looked at, and what can be written comes back the same."""
    found = inspect(adapter)
    assert found.numbers == adapter.parameters
    if adapter.missing or adapter.naming:
        return
    try:
        assert lk.norm(adapter).keys() <= {weight.name for weight in adapter.weights}
    except lk.LorakitError as error:
        check_message(error)
    try:
        lk.write(adapter, path)
    except lk.LorakitError as error:
        check_message(error)
        assert found.broken, "only NaN and infinity stand against writing what was read"
        return
    again = lk.read(path)
    assert again.header == adapter.header
    tensors, others = adapter.state_dict(), again.state_dict()
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert others[key].dtype == tensor.dtype and torch.equal(others[key], tensor), key


def _load(path: Path, adapter: lk.Adapter | None) -> None:
    """It fits a model, of which it then is an adapter; or not, and the model is as it was."""
    base = model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    try:
        lk.load(base, path, "mine", verify="off")
    except lk.LorakitError as error:
        check_message(error)
        _same(base, before)
        return
    assert adapter is not None, "it is loaded and cannot be read"
    held = sum(parameter.numel() for parameter in lk.adapter_parameters(base, "mine"))
    assert held, "what was loaded has no numbers"
    lk.detach(base)
    _same(base, before)


def _same(base: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
