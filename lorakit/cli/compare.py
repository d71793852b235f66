"""`lorakit compare`: two adapters side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import counted, natural_order, printable, show_table
from lorakit.cli.options import Alpha, Enabled, Heads, KvHeads, NamesFrom, Part, names_in, parse_enabled, read_lacking

if TYPE_CHECKING:
    from lorakit.formats import Known, Names
    from lorakit.values.adapter import Adapter
    from lorakit.values.comparison import Comparison

COLUMNS = ("weight", "‖ΔW‖ of A", "of B", "distance", "cosine", "φ in", "φ out")
EXPLANATION = """\
distance    ‖ΔW of A − ΔW of B‖ in units of the larger: 0 is the same update
cosine      how alike the two point: 1 the same way, 0 unrelated, −1 against each other
φ in, out   how much of the directions read from, and written to, both share: 0 none, 1 all (LoRA paper, §7.2)"""


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An adapter of any format.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same base.")],
    alpha: Alpha = None,
    names: NamesFrom = None,
    part: Part = None,
    enabled: Enabled = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Say for each weight how much two adapters change, how alike they are, and whether they collide.

    What is not in a file, such as its alpha, is given for those that lack it.
    """
    from lorakit.formats import Known, with_heads
    from lorakit.values.comparison import compare as compared

    target = None if names is None else names_in(names)
    known = Known(heads=heads, kv_heads=kv_heads, part=part)
    if target is not None:
        known = with_heads(known, target.config)
    given = {"alpha": alpha, "enabled": parse_enabled(enabled), "heads": known.heads, "kv_heads": known.kv_heads}
    left, right = _named_alike(read_lacking([a, b], **given), target, known)
    found = compared(left, right)
    shared = _shared(left, right)
    if as_json:
        weights = [{**asdict(w), "overlap": shared.get(w.name)} for w in found.weights]
        rest = {"only_a": found.only[0], "only_b": found.only[1], "unlike": found.unlike, "equal": found.equal}
        typer.echo(json.dumps({"same": found.same, "distance": found.distance, **rest, "weights": weights}, indent=2))
        return
    typer.echo(f"A: {a} ({left.format}), {counted(len(left.weights), 'weight')}")
    typer.echo(f"B: {b} ({right.format}), {counted(len(right.weights), 'weight')}\n")
    rows = []
    for w in sorted(found.weights, key=lambda w: natural_order(w.name)):
        phi = [f"{value:.2f}" for value in shared[w.name]] if w.name in shared else ["–", "–"]
        rows.append((printable(w.name), *(f"{n:.4g}" for n in w.norms), f"{w.distance:.3g}", f"{w.cosine:.3f}", *phi))
    if rows:
        show_table(COLUMNS, rows)
        typer.echo("")
    _show_rest(found, left, right, part)
    typer.echo(EXPLANATION)


def _show_rest(found: "Comparison", left: "Adapter", right: "Adapter", part: str | None) -> None:
    """What the table does not have, and the verdict."""
    for which, only in zip("AB", found.only, strict=True):
        if only:
            typer.echo(f"only {which} changes {', '.join(map(printable, only))}")
    if found.equal:
        typer.echo(f"no products of factors, and the same in both: {', '.join(map(printable, found.equal))}")
    for problem in found.unlike:
        typer.echo(f"not compared: {printable(problem)}")
    left_out = [("A", what) for what in left.left_out] + [("B", what) for what in right.left_out]
    for which, what in left_out:
        typer.echo(f"not compared: {which} also holds {printable(what)}")
    verdict = "the same adapter" if found.same else "two adapters"
    if found.same and left_out and part is None:
        verdict += ", but for what was not compared"
    typer.echo(f"{verdict}: distance {found.distance:.3g} over {counted(len(found.weights), 'weight')} of both\n")


def _named_alike(both: "list[Adapter]", names: "Names | None", known: "Known") -> "tuple[Adapter, Adapter]":
    """Both with names of one kind: those of a model, or those that one of them has."""
    from lorakit.formats import Names, resolved
    from lorakit.values.comparison import has_no_effect

    a, b = both
    if names is not None:
        return resolved(a, names, known), resolved(b, names, known)
    if a.naming != b.naming and {a.naming, b.naming} == {"kohya", "diffusers"}:
        dotted = a if a.naming == "diffusers" else b
        target = Names.of_list([_of_model(weight.name) for weight in dotted.weights])
        return resolved(a, target, known), resolved(b, target, known)
    if bool(a.naming) == bool(b.naming):
        return a, b
    one, other = (a, b) if a.naming else (b, a)
    # Of layers that the other does not have, what changes nothing needs no name.
    one = one.with_weights(weight for weight in one.weights if not has_no_effect(weight))
    one = resolved(one, Names.of_list([weight.name for weight in other.weights]), known)
    return (one, other) if a.naming else (other, one)


def _of_model(name: str) -> str:
    """A name in a pipeline's file as its model has it."""
    from lorakit.formats.dotted import part_of

    part = "diffusion_model" if name.startswith("diffusion_model.") else part_of(name)
    return name.removeprefix(f"{part}.") if part else name


def _shared(a: "Adapter", b: "Adapter") -> dict[str, tuple[float, float]]:
    """φ at full rank of the inputs' and of the outputs' directions, for weights where both do something."""
    from lorakit.values.measures import overlap

    return {w.name: (w.inputs, w.outputs) for w in overlap(a, b).weights}
