"""`lorakit svd`: the rank of every weight in a file; without a file, what rank is and what it saves."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from lorakit.algebra import Spectrum

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors names them
COLUMNS = ("weight", "shape", "rank", "stable", "effective", "90 %", "99 %")
EXPLANATION = """\
rank        singular values above rounding; at most the smaller side of the shape
stable      energy (the sum of squared singular values) in units of the largest's
effective   how many equal directions would be as spread out
90 %, 99 %  the rank of an approximation that keeps this share of the energy"""


@dataclass(frozen=True)
class Weight:
    """One matrix of a file; without a spectrum if it is not finite."""

    name: str
    shape: tuple[int, ...]
    spectrum: "Spectrum | None"


@dataclass(frozen=True)
class Contents:
    """What a file holds: its weights in natural order, and the other tensors' names by what they are."""

    weights: list[Weight]
    skipped: dict[str, list[str]]


def svd(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.safetensors]", help="The weights to look at; without it, an example."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Draw the singular values in this file, a .png say.")
    ] = None,
) -> None:
    """Show the rank of every weight in a file; without a file, what rank is and what it saves."""
    from lorakit.cli.svd_plot import check_plot, draw

    if plot is not None:
        check_plot(plot)
    if file is None:
        from lorakit.cli.svd_example import show_example

        title, spectra = "Singular values of a 10×10 matrix of rank 2", [("W", show_example())]
    else:
        contents = read(file)
        show(file, contents)
        where = printable("/".join(file.absolute().parts[-2:]))
        title = f"Singular values in {where if len(where) <= 60 else '…' + where[-59:]}"
        spectra = [(weight.name, weight.spectrum) for weight in contents.weights if weight.spectrum is not None]
    if plot is not None:
        draw(plot, title, spectra)
        typer.echo(f"\nDrawn in {plot}.")


def read(file: Path) -> Contents:
    """Every tensor of a safetensors file, read one at a time: memory is bounded by the largest.

    On a terminal a bar on stderr shows the progress.

    Raises:
        LorakitError: the file cannot be read, or holds no 2-D floating-point weight.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(file):
        inside = sorted(path.name for path in file.glob("*.safetensors"))
        hint = f"one of those in it, {inside[0]} say" if inside else "it holds none, so look elsewhere"
        raise LorakitError(f"{str(file)!r} is a directory; give a .safetensors file: {hint}")
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes: dict[str, tuple[int, ...]] = {}
            skipped = defaultdict(list)
            for name in sorted(tensors.keys(), key=natural_order):
                header = tensors.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if len(shape) == 2 and 0 not in shape and dtype in FLOATS:
                    shapes[name] = shape
                else:
                    skipped[f"empty {dtype}" if 0 in shape else f"{len(shape)}-D {dtype}"].append(printable(name))
            if not shapes:
                held = f"holds no 2-D floating-point weight, only {listed(skipped)}" if skipped else "holds no tensors"
                raise LorakitError(f"{str(file)!r} {held}; give a file with the weights of linear layers, or adapters")
            weights = []
            with progress() as bar:
                # The time that singular values take is of this order.
                task = bar.add_task("", total=sum(d * k * min(d, k) for d, k in shapes.values()))
                for name, (d, k) in shapes.items():
                    weights.append(Weight(printable(name), (d, k), spectrum_of(tensors.get_tensor(name))))
                    bar.advance(task, d * k * min(d, k))
            return Contents(weights, dict(skipped))
    except FileNotFoundError as error:
        raise LorakitError(f"there is no file {str(file)!r}; check the path") from error
    except OSError as error:
        raise LorakitError(f"cannot read {str(file)!r} ({error}); check what it is and who may read it") from error
    except SafetensorError as error:
        raise LorakitError(
            f"{str(file)!r} is no complete safetensors file ({error}); copy or download it again, "
            "or, if it is of another format, convert it with safetensors.torch.save_file"
        ) from error


def spectrum_of(W: "Tensor") -> "Spectrum | None":
    """The spectrum of a non-empty matrix of floats, or None if its entries or its norm are not finite."""
    from lorakit.algebra import Spectrum

    try:
        return Spectrum.of(W)
    except LorakitError:
        return None


def show(file: Path, contents: Contents) -> None:
    """A table on a terminal; elsewhere plain aligned lines, with nothing cut off."""
    weights, skipped = contents.weights, contents.skipped
    rows = [row(weight) for weight in weights]
    typer.echo(f"{counted(len(weights), 'weight')} in {file}\n")
    if sys.stdout.isatty():
        show_table(rows)
    else:
        from lorakit.tables import table

        typer.echo(table(COLUMNS, rows, right=COLUMNS[1:]))
    if skipped:
        n = sum(map(len, skipped.values()))
        typer.echo(f"\nSkipped {counted(n, 'tensor')}, not 2-D floating-point: {listed(skipped)}")
    typer.echo(f"\n{EXPLANATION}")


def row(weight: Weight) -> tuple[str, ...]:
    """The cells of one weight, in the order of `COLUMNS`."""
    from lorakit.tables import shape

    spectrum = weight.spectrum
    if spectrum is None:
        return (weight.name, shape(weight.shape), "not finite", "–", "–", "–", "–")
    return (
        weight.name,
        shape(weight.shape),
        str(spectrum.numerical_rank()),
        f"{spectrum.stable_rank:.2f}",
        f"{spectrum.effective_rank:.2f}",
        str(spectrum.rank_for_energy(0.9)),
        str(spectrum.rank_for_energy(0.99)),
    )


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """A table that folds long names to the terminal's width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column(COLUMNS[0], overflow="fold")
    for column in COLUMNS[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for name, *cells in rows:
        style = "red" if "not finite" in cells else ""
        grid.add_row(Text(name), *cells, style=style)  # as Text: brackets in a name are no markup
    Console().print(grid)


def progress() -> "Progress":
    """A bar on stderr that goes when done; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = "Singular values", BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def counted(n: int, noun: str) -> str:
    """1 weight, 2 weights."""
    return f"{n} {noun}{'s' * (n != 1)}"


def listed(skipped: dict[str, list[str]]) -> str:
    """7 × 1-D F32 (conv1.bias, …), 1 × 0-D I64 (step)."""
    return ", ".join(f"{len(names)} × {kind} ({names[0]}{', …' * (len(names) > 1)})" for kind, names in skipped.items())


def natural_order(name: str) -> str:
    """A key that sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def printable(name: str) -> str:
    """The name on one line, with control characters written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
