"""What several commands share: tables, bars, names on one line, and outputs that replace nothing unasked."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.errors import printable as printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from lorakit.values.adapter import Adapter


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], bad: Sequence[str] = ()) -> None:
    """A table, whose first column is of names and the others of numbers; rows that have one of `bad` in red.

    On a terminal long names are folded to its width; elsewhere lines are plain and nothing is cut off.
    """
    if not sys.stdout.isatty():
        from lorakit.tables import table

        print(table(columns, rows, right=columns[1:]))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for name, *cells in rows:
        style = "red" if any(word in cells for word in bad) else ""
        # As Text: brackets in a name are no markup.
        grid.add_row(*(Text(printable(cell)) for cell in (name, *cells)), style=style)
    Console().print(grid)


def progress(label: str) -> "Progress":
    """A bar on stderr that goes when done; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = label, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@contextmanager
def reporting(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that long work moves by calling (done, total, name)."""
    with progress(label) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf", ".lora")
"""What files of adapters and checkpoints end in."""


def check_output(path: Path, force: bool, *inputs: str | os.PathLike[str]) -> None:
    """Whether an output may be written there.

    Raises:
        LorakitError: something is there, and replacing it was not asked for, or it is no adapter and no checkpoint; or
            it is an input, holds one or lies in one.
    """
    if os.path.lexists(path) and not force:
        raise LorakitError(f"{path} is there already, and is left as it is; --force replaces it")
    if not path.name:
        raise LorakitError(f"cannot write to {str(path)!r}: name a file or a directory")
    real = path.resolve()
    for given in map(Path, inputs):
        source = given.resolve()
        if source == real:
            raise LorakitError(f"{path} is an input too: name another place to write to")
        if real in source.parents or source in real.parents:
            how = "lies in" if source in real.parents else "holds"
            raise LorakitError(f"{path} {how} the input {given}: name another place to write to")
    if path.is_dir() and not path.is_symlink():
        _check_replaceable(path, real)


def _check_replaceable(path: Path, real: Path) -> None:
    """A directory is replaced as a whole: a mistyped name must not take a home directory away.

    Raises:
        LorakitError: it is one that no command here has written.
    """
    try:
        entries = list(path.iterdir())
    except OSError as error:
        raise LorakitError(f"cannot write {path}: {error.strerror or error}") from None
    below = sorted(entry.name for entry in entries if entry.is_dir())
    what = None
    if real == Path.cwd() or real in Path.cwd().parents:
        what = "is the directory you are in, or holds it"
    elif below:
        what = f"holds directories, {below[0]!r} the first"
    elif entries and not any(entry.name.endswith(_WEIGHTS) for entry in entries):
        what = "holds no adapter and no checkpoint"
    if what is not None:
        raise LorakitError(f"{path} {what}, and is not replaced: name another place, or take it away yourself")


def write_adapter(adapter: "Adapter", out: Path, to: str, *, portable: bool = False, **asked: Any) -> tuple[str, ...]:
    """`lorakit.write`, in the place of what is there: all of a directory, so that no file of an older adapter is left.

    Raises:
        LorakitError: the format cannot hold it, or it cannot be written.
    """
    from lorakit.checkpoints.staged import staged
    from lorakit.exchange import write

    out = Path(os.path.abspath(out))
    with staged(out, force=True) as beside:
        try:
            return write(adapter, beside / out.name, to, portable=portable, **asked)
        except LorakitError as error:
            raise LorakitError(str(error).replace(str(beside / out.name), str(out))) from None


def counted(n: int, noun: str) -> str:
    """1 weight, 2 weights."""
    return f"{n} {noun}{'s' * (n != 1)}"


def natural_order(name: str) -> str:
    """A key that sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)
