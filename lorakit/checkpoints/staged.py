"""What is written bit by bit and appears at once: under a temporary name beside, and renamed when whole."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.storage import sync_directory

_OLD = ".old"
_NEW = ".partial"


@contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Path]:
    """A new directory to write into; what lies there under `out`'s name takes its place when the block ends.

    If the block raises, or the process dies, nothing appears at `out`. What a killed process left behind is taken away
    by the next that writes to the same place.

    Args:
        out: the file or directory that shall appear; its parents are made.
        force: whether it may take the place of what is there.

    Raises:
        LorakitError: something is there already, or it cannot be written.
    """
    if not out.name:
        raise LorakitError(f"cannot write to {str(out)!r}: name a directory or a file")
    beside, handle = _name(out, _NEW), None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clean(out)
        if not force and (out.exists() or out.is_symlink()):
            raise LorakitError(f"{out} exists already: name another place, or use force=True to put this in its place")
        beside.mkdir()
        handle = _lock(beside)
        yield beside
        made = beside / out.name
        if made.is_dir():
            sync_directory(made)
        _swap(made, out)
    except OSError as error:
        raise LorakitError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(beside, ignore_errors=True)


def _name(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{suffix}")


def _swap(made: Path, out: Path) -> None:
    """Put it in its place. A directory cannot take another's in one step: for a moment the old one has another name."""
    is_directory = out.is_dir() and not out.is_symlink()
    if not is_directory and not (made.is_dir() and (out.exists() or out.is_symlink())):
        os.replace(made, out)
        sync_directory(out.parent)
        return
    old = _name(out, _OLD)
    os.replace(out, old)
    try:
        os.replace(made, out)
    except OSError:
        os.replace(old, out)
        raise
    sync_directory(out.parent)
    if is_directory:
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _clean(out: Path) -> None:
    """Take away what killed processes left; put back what one was about to replace."""
    for left in out.parent.glob(f".{_escaped(out.name)}.*{_NEW}"):
        with suppress(OSError):
            handle = _lock(left)
            if handle is not None:  # else it is being written, or there is no way to know
                try:
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(handle)
    if not out.exists() and not out.is_symlink():
        for old in sorted(out.parent.glob(f".{_escaped(out.name)}.*{_OLD}"))[:1]:
            os.replace(old, out)


def _escaped(name: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _lock(directory: Path) -> int | None:
    """A handle that holds a lock on it until it is closed or the process ends; None if another has it, or no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
