"""Checkpoints of a run: whole or absent, checked when they are read, the best and the last few kept.

A checkpoint is a directory `step-00000120` of some megabytes: the adapter, the optimizer, the schedule, the random
states and the place in the data. The base is not in it. It is made under another name, synced, and renamed;
`whole.json`, written last, holds the size and the sha256 of every file. A process that is killed at any moment leaves
all earlier ones as they were.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.storage import read_json_object, sync_directory

_NAME = re.compile(r"step-(\d{8})")
_BESIDE = re.compile(r"\.step-\d{8}\.(new|old)")
_MANIFEST = "whole.json"
ADAPTER = "adapter"


class CheckpointError(LorakitError):
    """A checkpoint could not be written; those before it are as they were."""


def name_of_step(step: int) -> str:
    """What the checkpoint after this step is called."""
    return f"step-{step:08d}"


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after this step is made."""
    return folder / f".{name_of_step(step)}.new"


def step_of(path: Path) -> int:
    """After which step a checkpoint was made, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise LorakitError(f"{path} is no checkpoint: those are called step-00000120")
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints there, the earliest first, damaged ones too."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


@contextmanager
def written(folder: Path, step: int) -> Iterator[Path]:
    """A directory to write a checkpoint into, which becomes one when the block ends without an error.

    Raises:
        CheckpointError: something could not be written, such as on a full disk; nothing is left of it.
    """
    target, beside = folder / name_of_step(step), place_of(folder, step)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        seal(beside)
        if target.exists():  # of a run that was continued from before it
            discard(target)
        os.replace(beside, target)
        sync_directory(folder)
    except (OSError, RuntimeError, LorakitError) as error:
        if not _of_writing(error):
            raise
        raise CheckpointError(f"cannot write the checkpoint {target}: {_reason(error)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _of_writing(error: Exception) -> bool:
    """Torch says of a full disk that its writer failed, or that it is not where it should be, as a RuntimeError."""
    words = ("PytorchStreamWriter", "inline_container", "unexpected pos", "write")
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in words)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        hint = "; make room, then go on with resume=auto" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.strerror or error}{hint}"
    return f"{str(error).splitlines()[0]}; is the disk full? Make room, then go on with resume=auto"


def seal(folder: Path) -> None:
    """Sync every file, and write down what belongs to the checkpoint."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = file.read()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    manifest = folder / _MANIFEST
    with manifest.open("w", encoding="utf-8") as out:
        json.dump({"files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    for directory in {path.parent for path in folder.rglob("*")}:
        sync_directory(directory)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every byte is as it was written."""
    try:
        files = read_json_object(path / _MANIFEST)["files"]
        for name, facts in files.items():
            content = (path / name).read_bytes()
            if len(content) != facts["size"] or hashlib.sha256(content).hexdigest() != facts["sha256"]:
                return f"{name} is not what was written"
    except (OSError, KeyError, TypeError, AttributeError, LorakitError) as error:
        return str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is to be said of newer ones that are not."""
    notes: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        problem = damage(path)
        if problem is None:
            return path, notes
        notes.append(f"{path} is damaged ({problem}) and left out")
    return None, notes


def keep(folder: Path, last: int, best: int | None) -> None:
    """Delete all but the last few checkpoints and the best."""
    found = checkpoints_in(folder)
    kept = {*found[-last:], *([folder / name_of_step(best)] if best is not None else [])}
    for path in found:
        if path not in kept:
            discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint: at once under another name, so that no half of one is ever seen."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        os.replace(path, old)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Take away what a process that was killed left half-made or half-deleted."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _BESIDE.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def state_in(path: Path) -> dict[str, Any]:
    """What transformers' Trainer wrote of where the run stood.

    Raises:
        LorakitError: it is missing or no JSON.
    """
    return read_json_object(path / "trainer_state.json")
