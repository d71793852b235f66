"""Adapters as values: a weighted sum of some as a new one, computed from their factors alone."""

import torch
from torch import Tensor, nn

from lorakit.algebra.low_rank import Pair, check_bounds, concatenate, product_norm, recompress
from lorakit.change import Addition, add
from lorakit.errors import LorakitError
from lorakit.layers import accumulation_dtype, outline
from lorakit.state import Site, State, check_addition, check_complete, require, sites
from lorakit.sums import is_finite
from lorakit.switch import Choice, strengths_of
from lorakit.values.arithmetic import ResizedWeight, ResizeReport
from lorakit.variants import FactoredUpdate, LoRA, SubtractedUpdate


@torch.no_grad()
@torch.inference_mode(False)
def combine(
    model: nn.Module,
    choice: Choice,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    trainable: bool = False,
) -> ResizeReport:
    """Add a new adapter whose ΔW is the weighted sum of the ΔW of others, each with its own scale in it.

    B·A is never formed. The sum is exact, its factors side by side and its rank the sum of ranks, unless `rank`,
    `energy` or `error` bounds it: then each weight gets its best approximation in Frobenius norm. What does not adapt a
    weight counts as zero there. The new adapter is an ordinary `LoRA` with a scale of 1, becomes the only active one,
    and is saved, switched and merged like any other; the others stay as they are.

    Args:
        model: the model that was given to `attach`.
        choice: names with weights, {"sql": 0.7, "js": -0.3}; or a name, or a list of names, with weights of 1.
        name: what to call the new adapter.
        rank: at most so much for each weight; a weight whose exact sum has less keeps that.
        energy: for each weight the smallest rank that holds this share of ‖ΔW‖²: 0.99, say.
        error: for each weight the smallest rank with at most this relative error.
        trainable: whether it is to train; the others then do not.

    Returns:
        For each weight its rank, and the relative error.

    Raises:
        LorakitError: an unknown name, a taken one, or a bound out of range; adapters that are no product of two
            factors (DoRA, LoHa, LoKr, whole weights and rows), or that see a weight in different ways, all of them in
            one error. The model is as it was.

    Example:
        >>> print(combine(model, {"sql": 0.7, "js": 0.3}, "both", energy=0.99))
    """
    weights = strengths_of(choice)
    if not weights:
        raise LorakitError("nothing to combine: name adapters, with weights")
    root, state = require(model, list(weights))
    check_addition(model, name)
    check_bounds(rank, energy, error)
    for each in weights:
        check_complete(root, state, each)
    mine = [site for site in sites(root) if any(each in site.adapted for each in weights)]
    problems = [problem for site in mine for problem in _problems(site, state, list(weights))]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"cannot combine {', '.join(map(repr, weights))}:{listed}")
    additions, rows = [], []
    for site in mine:
        B, A = _exact(site, weights)
        whole, lost = B.shape[-1], 0.0
        bounded = (rank, energy, error) != (None, None, None)
        if bounded or whole > min(B.shape[-2], A.shape[-1]):  # a sum of many ranks has no more than the matrix
            B, A, lost, values = recompress(B, A, rank, energy=energy, error=error)
            norm = float(values.norm())
        else:
            norm = product_norm(B, A)
        additions.append(_addition(site, next(each for each in weights if each in site.adapted), B, A))
        size = (*B.shape[:-1], A.shape[-1])
        rows.append(ResizedWeight(site.name, size, whole, B.shape[-1], lost, norm))
    variant = LoRA(rank=max(row.rank for row in rows))
    add(root, name, variant, additions, trainable=trainable)
    return ResizeReport(name, tuple(rows))


def _problems(site: Site, state: State, names: list[str]) -> list[str]:
    """What stands against a sum in one weight."""
    found = []
    here = [each for each in names if each in site.adapted]
    for each in here:
        update, variant = site.adapted[each], state.weights[each][site.name]
        if not isinstance(update, FactoredUpdate | SubtractedUpdate):
            what = f"{type(variant).__name__} {variant.no_product}"
            found.append(f"{each!r} at {site.name!r}: {what}; merge it instead")
        elif any(tensor.is_meta for tensor in update.state_dict().values()):
            found.append(f"{each!r} at {site.name!r}: it is on 'meta' and has no values")
        elif not all(is_finite(tensor) for tensor in update.state_dict().values()):
            found.append(f"{each!r} at {site.name!r}: it holds NaN or infinity")
    kinds = {each: site.adapted[each].kind for each in here}
    if len(set(kinds.values())) > 1:
        seen = ", ".join(f"{each!r} as {kind}" for each, kind in kinds.items())
        found.append(f"{site.name!r} is seen in different ways: {seen}; adapt it in one way")
    return found


def _exact(site: Site, weights: dict[str, float]) -> Pair:
    """The sum in one weight: (d, Σr) and (Σr, k), in at least 32 bits."""
    pairs: list[Pair] = []
    here = [each for each in weights if each in site.adapted]
    for each in here:
        update = site.adapted[each]
        assert isinstance(update, FactoredUpdate | SubtractedUpdate)
        B, A = update.product(outline(site.layer, update.kind))
        dtype = accumulation_dtype(torch.promote_types(B.dtype, A.dtype))
        if update.kind.padding_idx is not None:  # what the factors hold there is no part of ΔW
            A = A.index_fill(-1, torch.tensor(update.kind.padding_idx, device=A.device), 0.0)
        pairs.append((B.to(dtype), A.to(dtype)))
    return concatenate(pairs, [weights[each] for each in here])


def _addition(site: Site, like: str, B: Tensor, A: Tensor) -> Addition:
    """The update with these factors, where another adapter has one."""
    model = site.adapted[like]
    weight = outline(site.layer, model.kind)
    variant = LoRA(rank=B.shape[-1])
    update = variant.build(model.kind, torch.empty_like(weight, device="meta"), model.mode)
    a_shape, b_shape = model.kind.factor_shapes(weight, variant.rank)
    dtype = accumulation_dtype(weight.dtype)
    # Copies: with one adapter and a weight of 1, the factors are that adapter's own.
    tensors = {"A": A.reshape(a_shape).to(dtype), "B": B.reshape(b_shape).to(dtype)}
    update.restore({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()})
    return Addition(site.name, site.layer, update, variant)
