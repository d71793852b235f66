"""`lorakit combine` and `lorakit resize`: arithmetic on adapters in files."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.common import check_output, write_adapter
from lorakit.cli.options import Alpha, Energy, Error, Force, From, Rank, To, read_weighted, weighted_path
from lorakit.errors import LorakitError


class Method(str, Enum):
    """How adapters are combined."""

    sum = "sum"
    ties = "ties"
    dare = "dare"


def combine(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="IN[=WEIGHT]... OUT", help="Adapters, each with a weight (1 if none); and the output."),
    ],
    method: Annotated[Method, typer.Option(help="The sum of all ΔW; or TIES, DARE, which need a rank.")] = Method.sum,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    density: Annotated[float, typer.Option(help="TIES, DARE: the share of ΔW's entries that is kept.")] = 0.2,
    seed: Annotated[int, typer.Option(help="DARE: which entries are dropped.")] = 0,
    alpha: Alpha = None,
    to: To = "lorakit",
    force: Force = False,
) -> None:
    """Add adapters up: ΔW = Σ weight·ΔW, exactly, or at the best smaller rank."""
    from lorakit.values.adapter import weighted_sum
    from lorakit.values.arithmetic import dare, ties
    from lorakit.values.arithmetic import resize as resized

    *inputs, last = paths
    if not inputs:
        raise LorakitError("combine needs an adapter and an output: lorakit combine a=0.5 b=0.5 OUT")
    out = Path(last)
    named = [weighted_path(text) for text in inputs]
    check_output(out, force, *(path for path, _ in named))
    weighted = read_weighted(named, alpha)
    if method is Method.sum:
        total = weighted_sum(weighted, name=out.stem)
        total, report = resized(total, rank=rank, energy=energy, error=error)
    elif method is Method.ties:
        total, report = ties(weighted, density=density, rank=rank, energy=energy, error=error, name=out.stem)
    else:
        total, report = dare(weighted, density=density, seed=seed, rank=rank, energy=energy, error=error, name=out.stem)
    _finish(report, write_adapter(total, out, to), out)


def resize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or directory to write.")],
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    alpha: Alpha = None,
    come_from: From = None,
    to: To = "lorakit",
    force: Force = False,
) -> None:
    """Give an adapter smaller ranks: for each weight the nearest ΔW of that rank, and the error that leaves."""
    from lorakit.exchange import read
    from lorakit.values.arithmetic import resize as resized

    if rank is None and energy is None and error is None:
        raise LorakitError("to what size? Give --rank, --energy or --error")
    check_output(out, force, source)
    adapter, report = resized(read(source, format=come_from, alpha=alpha), rank=rank, energy=energy, error=error)
    _finish(report, write_adapter(adapter, out, to), out)


def _finish(report: object, lost: tuple[str, ...], out: Path) -> None:
    typer.echo(str(report))
    for what in lost:
        typer.echo(f"not held: {what}")
    typer.echo(f"written: {out}")
