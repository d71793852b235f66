"""`lorakit convert`: an adapter in another format, and what that cannot hold."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.common import check_output, counted, write_adapter
from lorakit.cli.options import (
    WRITTEN,
    Alpha,
    Enabled,
    Force,
    From,
    Heads,
    KvHeads,
    NamesFrom,
    Part,
    names_in,
    read_with,
)
from lorakit.errors import LorakitError


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter of any format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or directory to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=WRITTEN)],
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
    from lorakit.formats import FORMATS, Known, Names, form_named, resolved, with_heads

    target = form_named(to)
    check_output(out, force, source)
    model = None if names is None else names_in(names)
    config = {} if model is None else model.config
    known = with_heads(Known(heads=heads, kv_heads=kv_heads, part=part, arch=arch), config)
    adapter = read_with(source, come_from, alpha, enabled, known)
    if heads is not None and "heads" not in (*FORMATS[adapter.format].takes, *target.takes, *target.asks):
        raise LorakitError(f"neither {adapter.format} nor {to} needs --heads: leave it away")
    if arch is not None and "arch" not in target.asks:
        raise LorakitError(f"{to} needs no arch: leave --arch away")
    if model is not None or (adapter.naming and (part is not None or (heads is not None and adapter.format != to))):
        adapter = resolved(adapter, Names({}) if model is None else model, known)
    asked = {name: getattr(known, name) for name in target.asks}
    lost = write_adapter(adapter, out, to, portable=portable, **asked)
    size = f"{counted(len(adapter.weights), 'weight')}, {adapter.parameters:,} numbers"
    typer.echo(f"{source} ({adapter.format}) → {out} ({to}): {size}")
    for what in adapter.left_out:
        typer.echo(f"left out: {what}")
    for what in lost:
        typer.echo(f"not held by {to}: {what}")
