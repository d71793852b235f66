"""`lorakit extract` and `lorakit merge`: whole checkpoints, one tensor at a time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import check_output, reporting, write_adapter
from lorakit.cli.options import Alpha, Enabled, Energy, Error, Force, From, Heads, KvHeads, Part, Rank, To, read_with
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.checkpoints.merging import CheckpointMergeReport
    from lorakit.header import WeightEntry
    from lorakit.values.adapter import Adapter


def extract(
    base: Annotated[Path, typer.Argument(help="The checkpoint that training began with: a file, or shards.")],
    tuned: Annotated[Path, typer.Argument(help="The checkpoint that it ended with.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter to write.")],
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    to: To = "lorakit",
    force: Force = False,
) -> None:
    """Turn a full fine-tune into an adapter: the best low-rank ΔW of each matrix, and changed vectors whole.

    Tensors are read one at a time. What is not captured is reported.
    """
    from lorakit.checkpoints.extracting import extract as extract_adapter

    if rank is None and energy is None and error is None:
        raise LorakitError("how much of the change? Give --rank, --energy or --error")
    check_output(out, force, base, tuned)
    with reporting("Extracting") as moved:
        adapter, report = extract_adapter(
            base, tuned, rank=rank, energy=energy, error=error, name=out.stem, progress=moved
        )
    lost = write_adapter(adapter, out, to)
    typer.echo(str(report))
    for what in lost:
        typer.echo(f"not held by {to}: {what}")
    typer.echo(f"written: {out}")


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint: a file, a directory; a hub id; or a run, whose base it is."
        ),
    ],
    adapter: Annotated[Path, typer.Argument(help="An adapter of any format, or a run of `lorakit train`.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The checkpoint to write, in the base's layout and dtype.")
    ],
    strength: Annotated[float, typer.Option(help="The factor before ΔW.")] = 1.0,
    least_survival: Annotated[
        float, typer.Option(help="Refuse if rounding leaves less than this share of an update; 0 never does.")
    ] = 0.5,
    part: Part = None,
    alpha: Alpha = None,
    come_from: From = None,
    enabled: Enabled = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the base's fingerprints.")] = True,
    force: Force = False,
) -> None:
    """Fold an adapter into a checkpoint: W + ΔW, formed in 32 bits, rounded once to the base's dtype.

    Of a run, the tokens that it taught to end with become ends of the model too.
    """
    from lorakit.finetune.ends import GENERATION, taught_ends
    from lorakit.finetune.merging import checkpoint_at
    from lorakit.finetune.other_dtype import without_rounded
    from lorakit.finetune.resolve import adapter_at
    from lorakit.formats import Known, Names, resolved, with_heads

    place, run = checkpoint_at(base), adapter
    check_output(out, force, place, adapter)
    adapter = adapter_at(adapter)
    names = Names.of_checkpoint(place)
    known = with_heads(Known(heads=heads, kv_heads=kv_heads, part=part), names.config)
    value = read_with(adapter, come_from, alpha, enabled, known)
    if part is not None and not value.naming:
        raise LorakitError(f"{adapter} has the names of one model, and needs no part: leave it away")
    value = resolved(value, names, known)
    if verify:
        value, said = without_rounded(value, lambda entry: None)
        if said is not None:
            typer.echo(said)
        if _only_dtype_differs(place, value):
            typer.echo(f"{base} is in another dtype than in training, and else the same")
            verify = False
    ends = taught_ends(place, run)
    files = {} if ends.file is None else {GENERATION: ends.file}
    with _in_words_of_the_command():
        report, notes = _merged(place, value, out, strength, least_survival, verify, force, files)
    typer.echo(report.brief())
    for note in (*notes, *([] if ends.said is None else [ends.said])):
        typer.echo(note)
    typer.echo(f"written: {out}")


def _merged(
    place: Path,
    value: "Adapter",
    out: Path,
    scale: float,
    least_survival: float,
    verify: bool,
    force: bool,
    files: dict[str, bytes],
) -> "tuple[CheckpointMergeReport, list[str]]":
    """One tensor at a time if the checkpoint's names say where they are; else by way of the live model."""
    from lorakit.checkpoints.merging import Verify, merge_checkpoint
    from lorakit.checkpoints.onto import NeedsModel
    from lorakit.finetune.merging import knows, merge_live

    check: Verify = "sample" if verify else "off"
    try:
        with reporting("Merging") as moved:
            report = merge_checkpoint(
                place,
                value,
                out,
                scale=scale,
                least_survival=least_survival,
                verify=check,
                force=force,
                progress=moved,
                files=files,
            )
        return report, []
    except NeedsModel:
        if not knows(place, value):
            raise
    return merge_live(
        place, value, out, scale=scale, least_survival=least_survival, verify=check, force=force, files=files
    )


@contextmanager
def _in_words_of_the_command() -> Iterator[None]:
    """Inside, errors are short and name options, not arguments of Python's."""
    from lorakit.checkpoints.checkpoint import shortened

    try:
        yield
    except LorakitError as error:
        text = re.sub(
            r"use verify='off'|load it unchecked: --verify off|give --verify off", "give --no-verify", str(error)
        )
        text = text.replace("least_survival=...", "--least-survival")
        if "other values than the base" in text and "--no-verify" not in text:
            text += "\nIf it is meant for this base, merge it unchecked: --no-verify"
        raise LorakitError(shortened(text)) from None


def _only_dtype_differs(base: Path, adapter: "Adapter") -> bool:
    """Whether the checkpoint is the base of training in another dtype: 16 bits on disk, and 32 when it was loaded."""
    from lorakit.checkpoints.opening import open_checkpoint
    from lorakit.finetune.other_dtype import in_other_dtype

    checkpoint = open_checkpoint(base, "the base")
    entries = [weight.entry for weight in adapter.weights if weight.entry.sample is not None]
    stored = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in checkpoint.tensors.items()}
    if all(stored.get(entry.name, entry.dtype) == entry.dtype for entry in entries):
        return False  # without reading anything

    def tensor_of(entry: "WeightEntry") -> "Tensor | None":
        return checkpoint.read(entry.name) if entry.name in checkpoint.tensors else None

    return in_other_dtype(entries, tensor_of) == "same"
