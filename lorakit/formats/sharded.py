"""An adapter of PEFT in several files, as transformers cuts what it finds too large for one."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.patterns import some
from lorakit.storage import read_json_object, read_tensors

_PART = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = "adapter_model.safetensors.index.json"


class Sharded(NamedTuple):
    """What the files hold together."""

    first: Path
    tensors: dict[str, Tensor]


def read_shards(folder: Path) -> Sharded | None:
    """All files of an adapter in several; None if there are none.

    Raises:
        LorakitError: files are missing, or one is damaged, or a tensor is in two of them, or not where the index says.
    """
    files = sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))
    index = folder / _INDEX
    if not files and not index.is_file():
        return None
    problems = _absent(files)
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for file in files:
        for key, tensor in read_tensors(file)[0].items():
            if key in tensors:
                problems.append(f"{key!r} is in {owner[key]} and in {file.name}")
            tensors[key], owner[key] = tensor, file.name
    if index.is_file():
        given = read_json_object(index).get("weight_map")
        if not isinstance(given, dict):
            raise LorakitError(f"{index} has no weight_map; save or fetch it again")
        elsewhere = [key for key, name in given.items() if owner.get(key) != name]
        problems += [f"{some(elsewhere)} are not in the files that its index names"] if elsewhere else []
        problems += [f"{some(beyond)} are not in its index"] if (beyond := [k for k in owner if k not in given]) else []
    if problems:
        raise LorakitError(f"{folder} is not whole: {'; '.join(problems)}. Save or fetch it again")
    return Sharded(files[0], tensors)


def _absent(files: list[Path]) -> list[str]:
    """Which of the files that their names count are missing."""
    found = [match for file in files if (match := _PART.fullmatch(os.fspath(file.name)))]
    counts = {int(match[2]) for match in found}
    if len(counts) != 1:
        return [f"its parts are of {len(counts)} different counts" if counts else "its parts are missing"]
    count = counts.pop()
    if count > len(files) + 1000:
        return [f"{count - len(files)} of {count} parts are missing"]
    gone = [str(i) for i in range(1, count + 1) if all(int(match[1]) != i for match in found)]
    return [f"of {count} parts it lacks number {', '.join(gone)}"] if gone else []
