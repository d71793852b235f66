"""The run directory: whose it is, what lies in it, and whether a run may begin or go on there."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.finetune.config import dumped, read_yaml
from lorakit.finetune.settings import Settings
from lorakit.finetune.training import checkpoints
from lorakit.storage import name_of, read_json_object, write_whole

FREE = {
    "data",  # these four are compared by what they hold
    "model",
    "revision",
    "validation",
    "device",
    "eval_batch_size",
    "keep_last",
    "log_every",
    "out",
    "overwrite",
    "patience",
    "report_to",
    "result",
    "resume",
    "sample_length",
    "samples",
    "save_every",
}
"""Settings that may differ when a run goes on: by themselves they change nothing that is trained."""
_FACTS = "run.json"
_OURS = ("checkpoints", "adapter")
_FILES = ("config.yaml", "run.json", "env.json", "metrics.jsonl", "loss.png", "report.html", "samples.jsonl")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run goes.

    Attributes:
        path: the directory.
        name: the adapter's; of a run that goes on, what it was called.
        resume: the checkpoint to go on from; None to begin.
        notes: what is to be said of it.
    """

    path: Path
    name: str
    resume: Path | None
    notes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the result goes."""
        return self.path / "adapter"


def path_of(settings: Settings) -> Path:
    """The run directory that the settings mean."""
    if settings.out is not None:
        return Path(os.path.expanduser(settings.out))
    return Path("runs") / name_of(Path(settings.data))


def adapter_name(settings: Settings) -> str:
    """What the adapter is called."""
    return settings.name if settings.name is not None else name_of(path_of(settings))


def open_directory(settings: Settings) -> RunDirectory:
    """Find out whether a run begins or goes on, changing nothing.

    Raises:
        LorakitError: a run is there and it was not said what to do with it; it was begun with other settings; the
            checkpoint to go on from is none, or damaged; the place is a file.
    """
    path = path_of(settings)
    if path.exists() and not path.is_dir():
        raise LorakitError(f"out: {path} is a file; name a directory")
    folder = path / "checkpoints"
    name, written = adapter_name(settings), path / "config.yaml"
    there = bool(checkpoints.checkpoints_in(folder)) or (path / "adapter").exists()
    if settings.resume == "never":
        if there and not settings.overwrite:
            raise LorakitError(
                f"{path} holds a run already: resume=auto goes on with it, overwrite=true deletes it and begins anew, "
                "out= names another place"
            )
        return RunDirectory(path, name, None)
    if settings.resume == "auto":
        found, notes = checkpoints.newest(folder)
        if found is None and checkpoints.checkpoints_in(folder):
            raise LorakitError(f"no checkpoint in {folder} is whole: {'; '.join(notes)}")
    else:
        found, notes = Path(settings.resume), []
        if found.resolve().parent != folder.resolve():
            raise LorakitError(f"resume: {found} is no checkpoint of the run {path}; give auto, or one in {folder}")
        if not found.is_dir():
            known = ", ".join(each.name for each in checkpoints.checkpoints_in(folder)) or "none"
            raise LorakitError(f"resume: there is no checkpoint {found}; in {folder} there are {known}")
        problem = checkpoints.damage(found)
        if problem is not None:
            raise LorakitError(f"resume: {found} cannot be used: {problem}")
    if found is not None and written.exists():
        before = read_yaml(written)
        name = settings.name if settings.name is not None else str(before.get("name") or name)
        _check_same(before, {**settings.model_dump(), "name": name}, written)
    return RunDirectory(path, name, found, tuple(notes))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], written: Path) -> None:
    changed = [
        f"{key}: it was {before[key]!r}, and is now {now[key]!r}"
        for key in now
        if key in before and key not in FREE and before[key] != now[key]
    ]
    if changed:
        raise LorakitError(
            "\n  ".join(
                [
                    f"the run in {written.parent} was begun with other settings; give those, or another out=, or "
                    "start_from= its adapter:",
                    *changed,
                ]
            )
        )


def check_facts(directory: RunDirectory, facts: Mapping[str, Any]) -> None:
    """Whether a run goes on with the data, the base and the processes that it began with.

    Raises:
        LorakitError: it does not; what differs is named.
    """
    kept = directory.path / _FACTS
    if directory.resume is not None and kept.exists():
        before = read_json_object(kept)
        changed = [
            f"{key} was {before[key]}, and is now {facts[key]}" for key in facts if before.get(key) != facts[key]
        ]
        if changed:
            raise LorakitError(
                f"the run in {directory.path} cannot go on as it began: {'; '.join(changed)}. Begin another "
                "(out=), perhaps with start_from= its adapter"
            )


def begin(directory: RunDirectory, settings: Settings, facts: Mapping[str, Any]) -> None:
    """Make the directory, or go on in it.

    Args:
        directory: what `open_directory` found.
        settings: as resolved; written to `config.yaml`.
        facts: of the data, the base and the processes; kept in `run.json`.

    Raises:
        LorakitError: it cannot be written to.
    """
    try:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(f"out: cannot write to {directory.path}: {error.strerror or error}") from None
    checkpoints.sweep(directory.checkpoints)
    if directory.resume is None:
        clear(directory.path)
        directory.checkpoints.mkdir(exist_ok=True)
    else:
        for later in checkpoints.checkpoints_in(directory.checkpoints):
            if checkpoints.step_of(later) > checkpoints.step_of(directory.resume):
                checkpoints.discard(later)
    write_whole(directory.path / _FACTS, json.dumps(dict(facts), indent=1).encode())
    write_whole(directory.path / "config.yaml", dumped(settings).encode())


def clear(path: Path) -> None:
    """Take away what an earlier run wrote, and nothing else: checkpoints first, so that no half of it seems whole."""
    for name in _OURS:
        shutil.rmtree(path / name, ignore_errors=True)
    for name in _FILES:
        (path / name).unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process trains in this directory, where the system has such locks.

    Raises:
        LorakitError: one does, or the directory cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise LorakitError(f"out: cannot write to {path}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LorakitError(f"another process trains in {path} now") from None
        yield
    finally:
        os.close(handle)
