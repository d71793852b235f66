"""The rows of q and k where positions are rotations, in the two orders that tools store them in.

A rotation turns pairs of a head's rows (Su et al. 2021, arXiv:2104.09864, §3.2.2). Meta's code, torchtune and llama.cpp
take neighbours, rows 2i and 2i + 1; transformers takes row i of the head's first half and row i of its second. The
same model has its rows in another order then, and so has the B of an adapter. Scores do not change, for q and k
are reordered alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.form import Known
from lorakit.values.weight import AdapterWeight

Reorder = Callable[[Tensor, int], Tensor]


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """(heads·size, ...) of neighbouring pairs in the order of halves, as transformers has it.

    Raises:
        LorakitError: the rows are no heads of an even size.
    """
    _check(rows, heads)
    result: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return result


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`: (heads·size, ...) with the two of each pair beside each other.

    Raises:
        LorakitError: the rows are no heads of an even size.
    """
    _check(rows, heads)
    result: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return result


def _check(rows: Tensor, heads: int) -> None:
    if heads < 1 or not rows.dim() or not rows.shape[0] or rows.shape[0] % (2 * heads):
        raise LorakitError(f"{tuple(rows.shape)} is not {heads} heads of an even number of rows each")


class Heads(NamedTuple):
    """How many heads a model has; None where it is not known."""

    q: int | None
    kv: int | None
    size: int | None = None
    """Rows of one head."""


def heads_of(config: Mapping[str, Any], known: Known) -> Heads:
    """What is known of the heads, from what was given and else from a config of transformers."""
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    q = known.heads if known.heads is not None else _count(config, "num_attention_heads", "n_head")
    kv = known.kv_heads if known.kv_heads is not None else _count(config, "num_key_value_heads", "n_query_groups")
    if kv is None and known.heads is None:
        kv = q  # a config of a model without grouped queries does not name them
    return Heads(q, kv, _count(config, "head_dim", "head_size"))


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is a number of something; transformers' name first, then LitGPT's."""
    found = (config.get(name) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and 0 < v <= 2**12), None)


def with_heads(known: Known, config: Mapping[str, Any]) -> Known:
    """The same, with the heads of the model's config where none were given."""
    heads = heads_of(config, known)
    return replace(known, heads=heads.q, kv_heads=heads.kv)


def reordered(
    weights: Iterable[AdapterWeight],
    part: Callable[[str], tuple[str, str] | None],
    heads: Heads,
    turn: Reorder,
    problems: list[str],
    sizes: Mapping[str, int] | None = None,
) -> list[AdapterWeight]:
    """The weights, with the rows of those of q and k in the other order.

    Args:
        weights: all weights of an adapter.
        part: a layer's name → what its block is called, and "q" or "k"; None of any other layer.
        heads: what is known of them. Heads of k that are not follow from the rows of q in the same block.
        turn: `to_halves` or `to_pairs`.
        problems: what is wrong or not known goes there.
        sizes: rows of q by block, where the model is known.
    """
    weights = list(weights)
    rows = dict(sizes or {})
    for weight in weights:
        found, B = part(weight.entry.path), weight.tensors.get("B")
        if found is not None and found[1] == "q" and B is not None:
            rows[found[0]] = B.shape[0]
    return [_turned(weight, part(weight.entry.path), heads, turn, problems, rows) for weight in weights]


def _turned(
    weight: AdapterWeight,
    found: tuple[str, str] | None,
    heads: Heads,
    turn: Reorder,
    problems: list[str],
    rows: Mapping[str, int],
) -> AdapterWeight:
    if found is None:
        return weight
    if not {"A", "B"} <= weight.tensors.keys():
        problems.append(f"{weight.name!r} is no low-rank update, and its rows are in another order there")
        return weight
    block, which = found
    size = heads.size or (rows[block] // heads.q if heads.q and block in rows else None)
    mine, B = weight.tensors["B"].shape[0], weight.tensors["B"]
    count = heads.q if which == "q" else heads.kv or (mine // size if size else None)
    if count is None:
        problems.append(
            f"{weight.name!r}: its rows are in the order of rotations, which depends on the heads: give heads=... "
            "and kv_heads=..., or a model whose config says them"
        )
        return weight
    if size is not None and count * size != mine:
        problems.append(f"{weight.name!r}: {mine} rows are not {count} heads of {size}; check heads= and kv_heads=")
        return weight
    try:
        turned = {name: turn(weight.tensors[name], count) for name in ("B", "magnitude") if name in weight.tensors}
    except LorakitError as error:
        problems.append(f"{weight.name!r}: {error}")
        return weight
    return weight._replace(tensors={**weight.tensors, **turned}) if B is not None else weight
