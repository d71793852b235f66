"""Options that several commands take, and the adapters that they name."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.formats import Known, Names
    from lorakit.values.adapter import Adapter

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
From = Annotated[
    str | None, typer.Option("--from", metavar="FORMAT", help="The input's format; else found from its keys.")
]
Alpha = Annotated[float | None, typer.Option(help="The scale's numerator, where the file does not hold it.")]
Enabled = Annotated[
    str | None,
    typer.Option(metavar="1,0,1", help="Which parts of a fused projection are adapted, where the file does not say."),
]
Heads = Annotated[int | None, typer.Option(help="Attention heads, where rows of q and k lie in another order.")]
KvHeads = Annotated[int | None, typer.Option(help="Heads of keys and values, if fewer.")]
NamesFrom = Annotated[
    Path | None,
    typer.Option(
        "--names",
        metavar="PATH",
        help="The model's names: a checkpoint, or a text file of parameter names, one a line.",
    ),
]
Part = Annotated[str | None, typer.Option(help="Which model of a pipeline is meant: unet, text_encoder, …")]
Rank = Annotated[int | None, typer.Option(help="At most this rank for each weight.")]
Energy = Annotated[float | None, typer.Option(help="The smallest rank with this share of ‖ΔW‖²: 0.99, say.")]
Error = Annotated[float | None, typer.Option(help="The smallest rank with at most this relative error.")]
WRITTEN = (
    "One of lorakit (PEFT reads it too), peft, kohya, diffusers, diffusers-old, comfyui, loralib, mlx, litgpt, "
    "torchtune, gguf."
)
"""Written out: to ask the formats for it would load torch to show a line of help."""
To = Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"The output's format. {WRITTEN}")]


def parse_enabled(text: str | None) -> tuple[bool, ...] | None:
    """(True, False, True) of "1,0,1".

    Raises:
        LorakitError: it is something else.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word in ("0", "1") for word in words):
        raise LorakitError(f"--enabled {text!r} must be zeros and ones, such as 1,0,1 for q and v of q, k, v")
    return tuple(word == "1" for word in words)


def read_with(path: Path, come_from: str | None, alpha: float | None, enabled: str | None, known: "Known") -> "Adapter":
    """An adapter, with the heads that are known if rows lie in another order in its format.

    Raises:
        LorakitError: it cannot be read, or holds what is given.
    """
    from lorakit.formats import Known, content_of

    given = Known(alpha, parse_enabled(enabled))
    content, form = content_of(path, come_from, given)
    if "heads" in form.takes:
        given = replace(given, heads=known.heads, kv_heads=known.kv_heads)
    return form.read(content, given)


def read_lacking(paths: Sequence[Path], **given: Any) -> "list[Adapter]":
    """Adapters, each read with what its own file lacks of what is given: one may hold its alpha and another not.

    Raises:
        LorakitError: one cannot be read, or none lacks an alpha or the parts that are given.
    """
    from lorakit.exchange import read

    given = {name: value for name, value in given.items() if value is not None}
    found: list[Adapter] = []
    needed: set[str] = set()
    for path in paths:
        adapter = read(path)
        missing = {*adapter.missing, *(["kv_heads"] if "heads" in adapter.missing else [])}
        wanted = {name: value for name, value in given.items() if name in missing}
        needed |= wanted.keys()
        found.append(read(path, **wanted) if wanted else adapter)
    needless = [name for name in ("alpha", "enabled") if name in given and name not in needed]
    if needless:
        raise LorakitError(f"{', '.join(map(str, paths))} lack no {' and no '.join(needless)}: leave it away")
    return found


def weighted_path(text: str) -> tuple[str, float]:
    """The path and the weight of "PATH" or "PATH=WEIGHT"; a path that is there may have "=" in it.

    Raises:
        LorakitError: the weight is no finite number.
    """
    path, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor) or not path:
        raise LorakitError(f"{text!r}: {weight!r} is no finite number; give PATH=WEIGHT, or PATH for a weight of 1")
    return path, factor


def read_weighted(named: Sequence[tuple[str, float]], alpha: float | None) -> "list[tuple[Adapter, float]]":
    """The adapters at these paths, each with its weight.

    Raises:
        LorakitError: one cannot be read.
    """
    adapters = read_lacking([Path(path) for path, _ in named], alpha=alpha)
    return [(adapter, factor) for adapter, (_, factor) in zip(adapters, named, strict=True)]


def names_in(path: Path) -> "Names":
    """The names that a checkpoint or a text file holds.

    Raises:
        LorakitError: it holds none.
    """
    from lorakit.formats import Names

    if path.is_file() and path.suffix in ("", ".txt"):
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise LorakitError(f"cannot read names from {path}: {error}") from None
        return Names.of_list(lines)
    return Names.of_checkpoint(path)
