"""`lorakit convert`: an adapter in another format, and what that cannot hold."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.common import check_output
from lorakit.cli.options import Alpha, Enabled, Force, From, Heads, KvHeads, NamesFrom, Part, names_in, read_with
from lorakit.errors import LorakitError


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter of any format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or directory to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="peft, kohya, diffusers, mlx, gguf, …; see below.")],
    come_from: From = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="One rank and one scale for all, which vLLM and llama.cpp scale rightly.")
    ] = False,
    names: NamesFrom = None,
    part: Part = None,
    alpha: Alpha = None,
    enabled: Enabled = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    arch: Annotated[str | None, typer.Option(help="The architecture as GGUF calls it: llama, …")] = None,
    force: Force = False,
) -> None:
    """Write an adapter in another format.

    Outputs of a model do not change: what the format cannot hold and outputs depend on is an error that lists all of
    it. Names that a file has flattened or numbered are found again in those of the model (--names).
    """
    from lorakit.exchange import write
    from lorakit.formats import FORMATS, Known, Names, form_named, resolved, with_heads

    target = form_named(to)
    check_output(out, force)
    model = None if names is None else names_in(names)
    known = with_heads(Known(heads=heads, kv_heads=kv_heads, part=part), {} if model is None else model.config)
    adapter = read_with(source, come_from, alpha, enabled, known)
    if heads is not None and "heads" not in (*FORMATS[adapter.format].takes, *target.takes):
        raise LorakitError(f"neither {adapter.format} nor {to} needs --heads: leave it away")
    if adapter.naming and (names is not None or part is not None or (heads is not None and adapter.format != to)):
        adapter = resolved(adapter, Names({}) if model is None else model, known)
    own = {name: value for name, value in vars(known).items() if name in ("heads", "kv_heads", "part")}
    lost = write(adapter, out, to, portable=portable, arch=arch, **own)
    typer.echo(
        f"{source} ({adapter.format}) → {out} ({to}): {len(adapter.weights)} weights, {adapter.parameters:,} numbers"
    )
    for what in adapter.left_out:
        typer.echo(f"left out: {what}")
    for what in lost:
        typer.echo(f"not held by {to}: {what}")
