"""The native form of an adapter in bytes: PEFT's directory, with a header of ours in the metadata of the tensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.header import Header
from lorakit.peft.config import peft_config
from lorakit.peft.layout import to_peft
from lorakit.safe import in_order
from lorakit.storage import all_finite, write_directory, write_whole

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def native_files(header: Header, tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, bytes]:
    """The content of both files by their names; the first holds everything by itself.

    Raises:
        LorakitError: a tensor has no values, or holds NaN or infinity.
    """
    tensors = finite(header.name, tensors)
    laid_out = to_peft(header, tensors)
    content = in_order(laid_out, metadata={"format": "pt", "lorakit": header.to_json()})
    config = json.dumps(peft_config(header, tensors, model), indent=2).encode()
    return {TENSORS: content, CONFIG: config}


def finite(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter in this machine's memory, ready to be written.

    Raises:
        LorakitError: one has no values, or holds NaN or infinity; `name` is the adapter's.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        raise LorakitError(f"adapter {name!r} is not saved: it is on 'meta' and has no values")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    bad = [key for key, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise LorakitError(f"adapter {name!r} is not saved: NaN or infinity in {', '.join(bad)}")
    return tensors


def write_files(
    files: Mapping[str, bytes], path: str | os.PathLike[str], suffixes: tuple[str, ...] = (".safetensors",)
) -> None:
    """Write a directory of these files, or the first of them alone if the path ends in one of the suffixes.

    A file appears whole or not at all, and so does a directory that was not there.

    Raises:
        LorakitError: the path cannot be written.
    """
    if not os.fspath(path):
        raise LorakitError("cannot write an adapter to an empty path: name a directory, or a .safetensors file")
    path = Path(path)
    if path.suffix in suffixes:
        if path.is_dir():
            raise LorakitError(f"cannot write {path}: it is a directory")
        write_whole(path, next(iter(files.values())))
        return
    if path.exists() and not path.is_dir():
        other = f", or a file ending in {suffixes[0]}" if suffixes else ""
        raise LorakitError(f"cannot write {path}: it is a file; name a directory{other}")
    write_directory(path, files)
