"""`lorakit inspect`: what is in an adapter, or in a checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import counted, natural_order, printable, show_table
from lorakit.cli.options import Alpha, Enabled, From, parse_enabled
from lorakit.errors import LorakitError, UnknownFormatError

if TYPE_CHECKING:
    from lorakit.values.inspection import InspectedWeight, Inspection

COLUMNS = ("weight", "matrix", "method", "rank", "alpha", "‖ΔW‖", "σ₁", "effective")
EXPLANATION = """\
‖ΔW‖        how much the adapter changes the weight: the Frobenius norm of scale·B·A
σ₁          its largest singular value: the most it changes any input of length 1
effective   how many equal directions would be as spread out"""


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter of any format, or a checkpoint.")],
    energy: Annotated[float, typer.Option(help="The share of ‖ΔW‖² that a suggested rank must hold.")] = 0.99,
    alpha: Alpha = None,
    enabled: Enabled = None,
    come_from: From = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with whole spectra, for other programs.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Draw the spectra in this file, a .png say.")
    ] = None,
) -> None:
    """Say what is in an adapter: format, base, ranks, scales, norms and spectra, and what is wrong with it.

    Of a checkpoint: the shape, dtype and norm of each tensor, read one at a time.
    """
    from lorakit.cli.svd_plot import check_plot
    from lorakit.exchange import read
    from lorakit.values.inspection import inspect as inspected

    if not 0 < energy <= 1:
        raise LorakitError(f"--energy {energy:g} must be above 0 and at most 1")
    if plot is not None:
        check_plot(plot)
    try:
        adapter = read(path, format=come_from, alpha=alpha, enabled=parse_enabled(enabled))
    except UnknownFormatError as error:
        for_adapters = {"--alpha": alpha, "--enabled": enabled, "--plot": plot}
        _inspect_other(path, error, [option for option, value in for_adapters.items() if value is not None], as_json)
        return
    found = inspected(adapter)
    if as_json:
        typer.echo(json.dumps(found.to_json(energy), indent=2))
    else:
        _show(path, found, energy)
    if plot is not None:
        _draw(plot, path, found, quiet=as_json)


def _inspect_other(path: Path, error: UnknownFormatError, needless: list[str], as_json: bool) -> None:
    """What is no adapter, as a checkpoint if it is one.

    Raises:
        LorakitError: it is none either; or options were given that say nothing of a checkpoint.
    """
    from lorakit.checkpoints.opening import open_checkpoint
    from lorakit.cli.inspect_checkpoint import inspect_checkpoint

    try:
        checkpoint = open_checkpoint(path)
    except LorakitError as other:
        raise LorakitError(f"{error}\nand no checkpoint either: {other}") from None
    if needless:
        draw = "; lorakit svd draws the spectra of its weights" if "--plot" in needless else ""
        raise LorakitError(f"{path} is a checkpoint and no adapter: leave {' and '.join(needless)} away{draw}")
    inspect_checkpoint(path, checkpoint, str(error), as_json)


def _show(path: Path, found: "Inspection", energy: float) -> None:
    held = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.dtypes.items())
    typer.echo(f"{path}: {found.format}, {counted(len(found.weights), 'weight')}, {found.numbers:,} numbers ({held})")
    typer.echo(f"name {found.name!r}, base {found.base or 'not said'}, {found.method}\n")
    weights = sorted(found.weights, key=lambda weight: natural_order(weight.name))
    last = f"for {100 * energy:g} %"
    rows = [(*_row(weight), _number(weight.rank_for_energy(energy)), weight.state or "ok") for weight in weights]
    show_table((*COLUMNS, last, "state"), rows, bad=["not finite", "zero"])
    typer.echo(f"\n{EXPLANATION}\n{last:<11} the smallest rank that holds {100 * energy:g} % of ‖ΔW‖²\n")
    for what in found.missing:
        typer.echo(f"not in the file: {what}; norms are those of a scale of 1")
    for what in found.left_out:
        typer.echo(f"beside the adapter: {printable(what)}")
    for state, names in (("no effect", found.dead), ("NaN or infinity", found.broken)):
        if names:
            typer.echo(
                f"{state} in {len(names)} of {counted(len(weights), 'weight')}: {', '.join(map(printable, names))}"
            )
    rank = found.rank_for_energy(energy)
    most = max((weight.rank for weight in weights if weight.spectrum is not None and weight.rank), default=0)
    if rank is not None and 0 < rank < most:
        typer.echo(
            f"rank {rank} would hold {100 * energy:g} % of every update: lorakit resize {path} OUT --energy {energy:g}"
        )


def _row(weight: "InspectedWeight") -> tuple[str, ...]:
    from lorakit.tables import shape

    return (
        printable(weight.name),
        shape(weight.size),
        weight.method,
        _number(weight.rank),
        _number(weight.alpha),
        _number(weight.norm),
        _number(weight.spectrum[0] if weight.spectrum else None),
        _number(weight.effective_rank),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _draw(plot: Path, path: Path, found: "Inspection", quiet: bool) -> None:
    import torch

    from lorakit.algebra import Spectrum
    from lorakit.cli.svd_plot import draw

    spectra = []
    for weight in sorted(found.weights, key=lambda weight: natural_order(weight.name)):
        if weight.spectrum:
            values = torch.tensor(weight.spectrum, dtype=torch.float64)
            spectra.append((printable(weight.name), Spectrum(values, (len(values), len(values)), torch.float64)))
    draw(plot, f"Singular values of the updates in {printable(path.name)}", spectra)
    if not quiet:
        typer.echo(f"\nDrawn in {plot}.")
