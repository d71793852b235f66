"""Files that `torch.save` wrote. Nothing in them is executed, and nothing in them is larger than they are."""

import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError

_WANTED = re.compile(r"(?:Unsupported (?:global|class): GLOBAL|Unsupported class) ([\w.]+)")
_VIEWS = 4
"""How many times the file all tensors together may be: some share memory with others."""


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by their names; of a list of tensors "[0]", "[1]", ….

    Raises:
        LorakitError: it is damaged, holds what can only be had by running code, is larger inside than outside, or
            holds anything but tensors by name.
    """
    _check_size(file)
    try:
        with file.open("rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of strange protocols
            loaded: Any = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes are anybody's, and torch's unpickler lets every kind of error through
        raise LorakitError(f"{file} is damaged, or cannot be read without running code in it: {_said(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if isinstance(loaded, list | tuple) and loaded and all(isinstance(each, Tensor) for each in loaded):
        loaded = {f"[{i}]": tensor for i, tensor in enumerate(loaded)}
    if not isinstance(loaded, Mapping) or not all(isinstance(key, str) for key in loaded):
        raise LorakitError(f"{file} holds a {type(loaded).__name__}, not tensors by name")
    tensors = {key: value.detach() for key, value in loaded.items() if isinstance(value, Tensor)}
    _check_tensors(file, tensors)
    return tensors


def _said(error: Exception) -> str:
    """What was wrong, without torch's advice to run the code after all."""
    text = str(error).strip() or type(error).__name__
    found = _WANTED.search(text)
    if found is not None:
        return f"it asks for {found[1]}, which is code. Load it where you trust it, and save its tensors as safetensors"
    inner = text.partition("WeightsUnpickler error: ")[2] or text
    return inner.splitlines()[0][:300] + "; save or fetch it again"


def _check_size(file: Path) -> None:
    """Torch packs nothing: what is larger inside than outside was made to be."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            inside = sum(member.file_size for member in archive.infolist())
        if inside > file.stat().st_size:
            raise LorakitError(
                f"{file} unpacks to {inside:,} bytes from {file.stat().st_size:,}: it is not to be trusted"
            )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise LorakitError(f"{file} is a damaged archive: {error}; save or fetch it again") from None


def _check_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A view can say that it is larger than the memory it is of; copies of it would be so."""
    size, total = file.stat().st_size, 0
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise LorakitError(f"{file}: {key!r} is no plain tensor")
        own = math.prod(tensor.shape) * tensor.element_size()
        total += own
        if own > size or total > _VIEWS * size:
            raise LorakitError(f"{file}: {key!r} of shape {tuple(tensor.shape)} is larger than the file that it is in")
