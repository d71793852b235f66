"""`lorakit inspect` of what is no adapter but a checkpoint: a table of its tensors."""

import json
from typing import TYPE_CHECKING

import typer

from lorakit.cli.common import counted, natural_order, printable, reporting, show_table

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.checkpoints.checkpoint import Checkpoint
    from lorakit.checkpoints.summary import CheckpointSummary

COLUMNS = ("tensor", "shape", "dtype", "norm", "state")


def inspect_checkpoint(path: "Path", checkpoint: "Checkpoint", why: str, as_json: bool) -> None:
    """Say what is in a checkpoint; `why` it is not taken for an adapter."""
    from lorakit.checkpoints.summary import summarize

    with reporting("Reading") as moved:
        found = summarize(checkpoint, moved)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(path, found, why)


def _show(path: "Path", found: "CheckpointSummary", why: str) -> None:
    from lorakit.tables import shape, size

    held = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.dtypes.items())
    typer.echo(f"{path}: a checkpoint, {counted(len(found.tensors), 'tensor')}, {found.numbers:,} numbers ({held})")
    typer.echo(f"{size(found.bytes)} in {counted(len(found.files), 'file')}; it is shown as such because {why}\n")
    rows = [
        (
            printable(tensor.name),
            shape(tensor.shape) or "scalar",
            tensor.dtype,
            "–" if tensor.norm is None else f"{tensor.norm:.4g}",
            tensor.state or "ok",
        )
        for tensor in sorted(found.tensors, key=lambda tensor: natural_order(tensor.name))
    ]
    show_table(COLUMNS, rows, bad=["not finite", "zero"])
    typer.echo("\nnorm   the Frobenius norm; – of whole numbers, and of what is not finite")
    for name, kept in found.tied.items():
        typer.echo(f"tied: {printable(name)} is {printable(kept)}, stored once")
    for state, what in (("zero", "all zero"), ("not finite", "NaN or infinity")):
        names = found.names(state)
        if names:
            typer.echo(f"{what} in {counted(len(names), 'tensor')}: {', '.join(map(printable, names))}")
