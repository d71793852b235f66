"""Fold adapters into the weights, for a while or for good, and say what rounding took from them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.change import bare, drop_all
from lorakit.errors import LorakitError
from lorakit.layers import accumulation_dtype, base_weight
from lorakit.state import Site, State, check_complete, check_together, layers_of, require, sites
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


def merge(model: nn.Module, choice: Choice | None = None) -> MergeReport:
    """W ← W + ΔW for good. No adapter is left, and no overhead; the model is trainable where it once was.

    Sums are formed in at least 32 bits and rounded once. A weight that is tied to another is untied: only the adapted
    layer gets the update.

    Args:
        model: the model that was given to `attach`.
        choice: as for `activate`; by default what is active now.

    Returns:
        For each weight how large the update was, and what rounding to the weight's dtype lost.

    Warns:
        Where rounding lost more than half of an update, when other resident adapters go with it, and when a tie is
        cut: a library that ties weights again later would undo the merge.

    Raises:
        LorakitError: nothing to merge, or the result is not finite; the model is as it was.
    """
    root, state, strengths = _chosen(model, choice)
    merged = _merge(root, strengths)
    dropped = tuple(name for name in state.variants if name not in strengths)
    owners = _owners(root)
    untied = tuple(site.name for site, _, _ in merged if owners[id(site.layer._parameters[site.parameter])] > 1)
    drop_all(root, state)
    for site, weight, _ in merged:
        parameter = site.layer._parameters[site.parameter]
        assert parameter is not None
        if site.name in untied:
            setattr(site.layer, site.parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad))
        else:
            with torch.no_grad():
                parameter.copy_(weight)
    report = MergeReport(tuple(row for _, _, row in merged), dropped, untied)
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
    merged = _merge(root, strengths)
    with bare(root):
        aside = [(site, site.layer._parameters[site.parameter]) for site, _, _ in merged]
        try:
            for site, weight, _ in merged:
                setattr(site.layer, site.parameter, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for site, parameter in aside:
                setattr(site.layer, site.parameter, parameter)


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
def _merge(root: nn.Module, strengths: dict[str, float]) -> list[tuple[Site, Tensor, MergedWeight]]:
    """Every merged weight, checked; nothing is changed yet."""
    merged, bad = [], []
    for site in sites(root):
        names = [name for name in strengths if name in site.adapted]
        if not names:
            continue
        if site.layer._parameters.get(site.parameter) is None:
            raise LorakitError(f"cannot merge into {site.name!r}: it is computed from other parameters")
        weight = base_weight(site.layer, site.parameter)
        wide = weight.to(accumulation_dtype(weight.dtype))
        total = wide
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                total = site.adapted[name].add_to(total, weight, strengths[name])
        result = total.to(weight.dtype)
        if not result.isfinite().all():
            bad.append(site.name)
        merged.append((site, result, _row(site.name, wide, total, result)))
    if bad:
        raise LorakitError(f"merging {', '.join(map(repr, strengths))} gives NaN or infinity in {', '.join(bad)}")
    return merged


def _row(name: str, wide: Tensor, total: Tensor, result: Tensor) -> MergedWeight:
    size = float((total - wide).norm())
    weight = float(wide.norm())
    lost = float((result.to(total.dtype) - total).norm())
    return MergedWeight(name, size / weight if weight else float("inf"), lost / size if size else 0.0)


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
            "unmerged, or merge into float32",
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
