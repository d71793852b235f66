"""`lorakit svd`: the rank of every weight in a file; without a file, what rank is and what it saves."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import counted, natural_order, printable, progress, show_table
from lorakit.errors import LorakitError

if TYPE_CHECKING:
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
            with progress("Singular values") as bar:
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
    show_table(COLUMNS, rows, bad=["not finite"])
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


def listed(skipped: dict[str, list[str]]) -> str:
    """7 × 1-D F32 (conv1.bias, …), 1 × 0-D I64 (step)."""
    return ", ".join(f"{len(names)} × {kind} ({names[0]}{', …' * (len(names) > 1)})" for kind, names in skipped.items())
