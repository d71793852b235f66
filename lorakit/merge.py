"""Fold adapters into the weights, for a while or for good, and say what rounding took from them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.change import bare, drop_all
from lorakit.errors import LorakitError
from lorakit.layers import (
    Foreign,
    Requantized,
    dense_weight,
    plain_linear,
    replace_layer,
    requantized,
)
from lorakit.state import Site, State, check_complete, check_together, layers_of, require, sites
from lorakit.sums import LowRankSum, Norms, Terms, is_finite, low_rank_sum, norms_of, wide_sum
from lorakit.switch import Choice, strengths_of
from lorakit.tables import table

_MUCH = 0.5


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to one weight. Norms are Frobenius norms."""

    name: str
    change: float
    """‖ΔW‖ / ‖W‖: the update's size beside the weight's."""
    lost: float
    """‖rounded(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖: 0 is exact, near 1 the update is gone in the weight's rounding."""


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did."""

    weights: tuple[MergedWeight, ...]
    dropped: tuple[str, ...]
    """Resident adapters that were not merged, and are gone."""
    untied: tuple[str, ...]
    """Weights that were tied to others and are now tensors of their own."""

    def __str__(self) -> str:
        rows = [[w.name, f"{w.change:.3g}", f"{w.lost:.2g}"] for w in self.weights]
        return table(["weight", "change", "lost"], rows, right=("change", "lost"))


def merge(model: nn.Module, choice: Choice | None = None, *, dequantize: bool | torch.dtype = False) -> MergeReport:
    """W ← W + ΔW for good. No adapter is left, and no overhead; the model is trainable where it once was.

    Sums are formed in at least 32 bits and rounded once. A weight that is tied to another is untied: only the adapted
    layer gets the update. A weight that is quantized by bitsandbytes is dequantized, changed and quantized again, which
    costs much of a small update; others that are quantized are refused, unless they may become plain.

    Args:
        model: the model that was given to `attach`.
        choice: as for `activate`; by default what is active now.
        dequantize: put a plain `nn.Linear` of floats in the place of each quantized layer that an adapter is merged
            into, with nothing lost but the memory that was saved. A dtype says which floats; True takes those that the
            weight dequantizes to.

    Returns:
        For each weight how large the update was, and what rounding to the weight's dtype lost.

    Warns:
        Where rounding lost more than half of an update, when other resident adapters go with it, and when a tie is
        cut: a library that ties weights again later would undo the merge.

    Raises:
        LorakitError: nothing to merge, or the result is not finite; the model is as it was.
    """
    root, state, strengths = _chosen(model, choice)
    merged = _merge(root, strengths, dequantize, report=True)
    dropped = tuple(name for name in state.variants if name not in strengths)
    owners = _owners(root)
    untied = tuple(site.name for site, _, _ in merged if owners.get(id(_parameter(site)), 1) > 1)
    drop_all(root, state)
    rows = []
    for site, result, norms in merged:
        if isinstance(result, LowRankSum):
            norms = result.norms(_write(site, result, tied=site.name in untied))
        else:
            _put(root, site, result, tied=site.name in untied)
        assert norms is not None
        rows.append(merged_weight(site.name, norms))
    report = MergeReport(tuple(rows), dropped, untied)
    _warn(report)
    return report


@contextmanager
def merged(model: nn.Module, choice: Choice | None = None) -> Iterator[None]:
    """Plain weights W + ΔW inside a `with` block, without hooks or adapters; the base, bit for bit, after it.

    The adapted weights are put aside, not copied. What is done to the merged ones inside goes with them, and what is
    done to the rest of the model stays, so do not train or convert it inside. Other verbs raise inside the block.

    Raises:
        LorakitError: nothing to merge, or the result is not finite; the model is as it was.
    """
    root, _, strengths = _chosen(model, choice)
    merged = _merge(root, strengths, report=False)
    with bare(root):
        inside = [(site.layer, _attributes(site, result)) for site, result, _ in merged]
        aside = [(layer, {name: getattr(layer, name) for name in attributes}) for layer, attributes in inside]
        try:
            for layer, attributes in inside:
                _set(layer, attributes)
            yield
        finally:
            for layer, attributes in aside:
                _set(layer, attributes)


Result = LowRankSum | Tensor | Requantized | nn.Linear
"""What a merged weight becomes: a sum that is not formed yet, other floats, quantized anew, or a plain layer."""


@torch.no_grad()
def _attributes(site: Site, result: Result) -> dict[str, Any]:
    """What `merged` sets on the layer."""
    if isinstance(result, Requantized):
        return result.attributes
    if isinstance(result, LowRankSum):
        weight = _weight(site)
        fresh = torch.empty_like(weight)
        result.write(weight, fresh)
        result = fresh
    assert isinstance(result, Tensor)
    return {site.parameter: nn.Parameter(result, requires_grad=False)}


@torch.no_grad()
def _write(site: Site, result: LowRankSum, *, tied: bool) -> float:
    """Form the sum in the place of the weight, and say what rounding took, as a norm."""
    weight = _weight(site)
    if not tied:
        return result.write(weight, weight, measure=True)
    fresh = torch.empty_like(weight)
    lost = result.write(weight, fresh, measure=True)
    _put(None, site, fresh, tied=True)
    return lost


@torch.no_grad()
def _put(root: nn.Module | None, site: Site, result: Result, *, tied: bool) -> None:
    """Give the layer what its weight became."""
    if isinstance(result, Requantized):
        _set(site.layer, result.attributes)
    elif isinstance(result, nn.Linear):
        assert root is not None
        replace_layer(root, site.layer, result)
    else:
        assert isinstance(result, Tensor)
        weight = _weight(site)
        if tied:
            setattr(site.layer, site.parameter, nn.Parameter(result, requires_grad=weight.requires_grad))
        else:
            weight.copy_(result)


def _weight(site: Site) -> nn.Parameter:
    weight = _parameter(site)
    assert weight is not None
    return weight


def _set(layer: nn.Module, attributes: dict[str, Any]) -> None:
    plain = type(layer).__setattr__ is nn.Module.__setattr__
    for name, value in attributes.items():
        if plain and isinstance(value, nn.Parameter) and name in layer._parameters:
            layer._parameters[name] = value  # what torch does in the end, after looking at all else that it may be
        else:
            setattr(layer, name, value)


def _parameter(site: Site) -> nn.Parameter | None:
    return site.layer._parameters.get(site.parameter)


def _chosen(model: nn.Module, choice: Choice | None) -> tuple[nn.Module, State, dict[str, float]]:
    root, state = require(model, None if choice is None else list(strengths_of(choice)))
    strengths = dict(state.selection.active) if choice is None else strengths_of(choice)
    if not strengths:
        raise LorakitError("nothing to merge: no adapter is active or named; name one")
    for name in strengths:
        check_complete(root, state, name)
    check_together(state, strengths)
    return root, state, strengths


@torch.no_grad()
def _merge(
    root: nn.Module, strengths: dict[str, float], dequantize: bool | torch.dtype = False, *, report: bool
) -> list[tuple[Site, Result, Norms | None]]:
    """Every merged weight, known to be finite, and if asked for its norms; nothing is changed yet."""
    merged, bad = [], []
    for site in sites(root):
        terms = [(site.adapted[name], strength) for name, strength in strengths.items() if name in site.adapted]
        if not terms:
            continue
        if _parameter(site) is None and not isinstance(terms[0][0].kind, Foreign):
            raise LorakitError(f"cannot merge into {site.name!r}: it is computed from other parameters")
        try:
            result, norms = _result(root, site, terms, dequantize, report)
        except LorakitError as error:
            raise LorakitError(f"cannot merge into {site.name!r}: {error}") from None
        if result is None:
            bad.append(site.name)
        else:
            merged.append((site, result, norms))
    if bad:
        raise LorakitError(f"merging {', '.join(map(repr, strengths))} gives NaN or infinity in {', '.join(bad)}")
    return merged


def _result(
    root: nn.Module, site: Site, terms: Terms, dequantize: bool | torch.dtype, report: bool
) -> tuple[Result | None, Norms | None]:
    """What becomes of the weight, None if it is not finite; and norms, but of a sum that is not formed yet."""
    kind = terms[0][0].kind
    weight = dense_weight(site.layer, kind)
    thin = None if isinstance(kind, Foreign) else low_rank_sum(weight, terms)
    if thin is not None:
        return thin, None
    with torch.autocast(weight.device.type, enabled=False):
        wide, total = wide_sum(weight, terms)
    if not is_finite(total):
        return None, None
    result: Tensor | Requantized | nn.Linear
    if not isinstance(kind, Foreign):
        result = total.to(weight.dtype)
    elif dequantize is False:
        result = requantized(site.layer, kind, total)
    elif site.layer is root:
        raise LorakitError("the model itself is this layer, and nothing can take its place; wrap it in nn.Sequential")
    else:
        result = plain_linear(site.layer, kind, total, weight.dtype if dequantize is True else dequantize)
    dense = _dense(result)
    if dense is not total and not is_finite(dense):
        return None, None
    return result, norms_of(wide, total, dense) if report else None


def _dense(result: Tensor | Requantized | nn.Linear) -> Tensor:
    """The values that the layer will have."""
    if isinstance(result, Tensor):
        return result
    return result.dense if isinstance(result, Requantized) else result.weight


def merged_weight(name: str, norms: Norms) -> MergedWeight:
    """What a report says of these norms."""
    change = norms.change / norms.weight if norms.weight else float("inf")
    return MergedWeight(name, change, norms.lost / norms.change if norms.change else 0.0)


def _owners(root: nn.Module) -> dict[int, int]:
    """How many (module, name) hold each parameter: more than one is a tie."""
    count: dict[int, int] = {}
    for module in {id(module): module for _, module in layers_of(root)}.values():
        for parameter in module._parameters.values():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _warn(report: MergeReport) -> None:
    faint = [weight for weight in report.weights if weight.lost > _MUCH]
    if faint:
        worst = max(faint, key=lambda weight: weight.lost)
        warnings.warn(
            f"rounding lost more than half of the update in {len(faint)} of {len(report.weights)} weights "
            f"(worst: {worst.name!r}, {worst.lost:.0%}): the update is too small for the weights' dtype; keep it "
            "unmerged, merge into float32, or merge with dequantize=True if they are quantized",
            stacklevel=3,
        )
    if report.untied:
        warnings.warn(
            f"merging untied {', '.join(map(repr, report.untied))} from the weights it was shared with, which stay as "
            "they are; tying them again (as transformers' tie_weights does) would lose the update",
            stacklevel=3,
        )
    if report.dropped:
        warnings.warn(
            f"merging took away the other resident adapters too: {', '.join(map(repr, report.dropped))}", stacklevel=3
        )
