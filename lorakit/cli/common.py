"""What several commands share: tables, bars, names on one line, and outputs that replace nothing unasked."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.errors import printable as printable

if TYPE_CHECKING:
    from rich.progress import Progress


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


def check_output(path: Path, force: bool) -> None:
    """Whether an output may be written there.

    Raises:
        LorakitError: something is there, and replacing it was not asked for.
    """
    if os.path.lexists(path) and not force:
        raise LorakitError(f"{path} is there already, and is left as it is; --force replaces it")


def counted(n: int, noun: str) -> str:
    """1 weight, 2 weights."""
    return f"{n} {noun}{'s' * (n != 1)}"


def natural_order(name: str) -> str:
    """A key that sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)
