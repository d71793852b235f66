"""Fold an adapter into a checkpoint, one tensor in memory at a time; the values are those of `merge`, to the bit."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lorakit.checkpoints.checkpoint import listed
from lorakit.checkpoints.onto import onto
from lorakit.checkpoints.opening import Source, open_checkpoint
from lorakit.checkpoints.rewrite import Progress, rewrite
from lorakit.errors import LorakitError
from lorakit.layers import Update
from lorakit.merge import MergedWeight, merged_weight
from lorakit.sums import Norms, is_finite, low_rank_sum, norms_of, wide_sum
from lorakit.tables import table
from lorakit.values.adapter import Adapter
from lorakit.variants import FullUpdate

Verify = Literal["sample", "off"]

_BLOCK = 2**20
"""Numbers of a weight that are widened at a time, where the update lets itself be cut."""


@dataclass(frozen=True)
class CheckpointMergeReport:
    """What `merge_checkpoint` did."""

    weights: tuple[MergedWeight, ...]
    """For each adapted weight how large the update was, and what rounding took of it."""
    lost: float
    """The share of all updates together that rounding took: 0 is exact."""
    prefix: str
    """What was added to the adapter's names ("+model."), or taken from them ("-base."); "" if they were those."""
    untied: tuple[str, ...]
    """Names that shared their values with an adapted weight in memory: they keep those of the base."""
    left_out: tuple[str, ...]
    """What lies in the base's directory and was not copied: other files of weights, directories, hidden files."""
    change: float = 0.0
    """The norm of all updates together beside that of the weights: ‖ΔW‖ / ‖W‖."""

    def __str__(self) -> str:
        return "\n".join([_table(self.weights), *self._said()])

    def brief(self, most: int = 5) -> str:
        """All of it together, and the weights that rounding took most of: those of a large model fill no screen."""
        worst = sorted(self.weights, key=lambda weight: (-weight.lost, -weight.change))
        count = f"{len(worst)} weight{'s' * (len(worst) != 1)}"
        lines = [f"{count} merged: change {self.change:.3g} of their norm, {self.lost:.2g} of it lost in rounding"]
        if len(worst) > most:
            lines.append(f"the {most} that lost most:")
        return "\n".join([*lines, _table(worst[:most]), *self._said()])

    def _said(self) -> list[str]:
        lines = []
        if self.prefix:
            what = "added to" if self.prefix[0] == "+" else "taken from"
            lines.append(f"{self.prefix[1:]!r} was {what} the adapter's names")
        if self.untied:
            lines.append(f"no longer tied, and as in the base: {', '.join(self.untied)}")
        if self.left_out:
            lines.append(f"not copied: {', '.join(self.left_out)}")
        return lines


def _table(weights: Sequence[MergedWeight]) -> str:
    rows = [[w.name, f"{w.change:.3g}", f"{w.lost:.2g}"] for w in weights]
    return table(["weight", "change", "lost"], rows, right=("change", "lost"))


def merge_checkpoint(
    base: Source,
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    least_survival: float = 0.5,
    verify: Verify = "sample",
    force: bool = False,
    progress: Progress | None = None,
    files: Mapping[str, bytes] | None = None,
) -> CheckpointMergeReport:
    """Write the checkpoint W + scale·ΔW of a base and an adapter, without a model, and with one tensor in memory.

    Sums are formed in at least 32 bits and rounded once to the base's dtype: bit for bit what `merge` makes of the live
    model. Names, shapes, dtypes, order, shards, metadata and the other files of the directory are the base's. The
    result appears at `out` whole, or not at all.

    Args:
        base: a safetensors file, a directory of shards, a file of torch, a mapping of tensors, or a module.
        adapter: what `read` gave; its names are the checkpoint's, or are so with one prefix added or dropped.
        out: a directory; or a file ending in .safetensors, if the base is one file, a mapping or a module.
        scale: the strength of the adapter.
        least_survival: refuse if rounding to the base's dtype leaves less than this share of an update's norm; 0 to
            take what comes.
        verify: "sample" compares fingerprints of the adapted weights with those that the adapter holds; "off" does not.
        force: put the result in the place of what is at `out`.
        progress: called with the bytes done, the bytes of all, and the name of the tensor that is next.
        files: other files of the directory, by their names: these are written, and not the base's.

    Raises:
        LorakitError: the adapter does not fit (all that is wrong in one error), the base is quantized, rounding takes
            too much, the result is not finite, or `out` exists or cannot be written. Nothing appears at `out` then.
    """
    if verify not in ("sample", "off"):
        raise LorakitError(f"verify={verify!r} must be 'sample' or 'off'")
    for name, number, most in (("scale", scale, math.inf), ("least_survival", least_survival, 1.0)):
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not math.isfinite(number)
            or number > most
        ):
            raise LorakitError(f"{name}={number!r} must be a finite number{' of at most 1' if most == 1 else ''}")
    checkpoint = open_checkpoint(base, "the base")
    found = onto(adapter, checkpoint, check_values=verify == "sample")
    norms: dict[str, Norms] = {}
    bad: list[str] = []

    def change(update: Update, name: str, value: Tensor) -> Tensor:
        result = _folded(value, update, scale)
        if result is None:
            bad.append(name)
            return value
        norms[name] = result[1]
        return result[0]

    def accept() -> None:
        if bad:
            raise LorakitError(f"merging {adapter.name!r} gives NaN or infinity in {', '.join(bad)}")
        check_survival([merged_weight(name, own) for name, own in norms.items()], least_survival)

    changes = {name: partial(change, update) for name, update in found.updates.items()}
    left_out = rewrite(checkpoint, out, changes, force=force, progress=progress, accept=accept, files=files)
    rows = tuple(merged_weight(name, own) for name, own in norms.items())
    lost, total, weight = (
        math.hypot(*(getattr(own, what) for own in norms.values())) for what in ("lost", "change", "weight")
    )
    lost, moved = (part / whole if whole else 0.0 for part, whole in ((lost, total), (total, weight)))
    return CheckpointMergeReport(rows, lost, found.prefix, found.untied, left_out, moved)


@torch.no_grad()
def _folded(weight: Tensor, update: Update, scale: float) -> tuple[Tensor, Norms] | None:
    """The merged weight, which may be written over the old one, and norms; None if it is not finite."""
    thin = low_rank_sum(weight, [(update, scale)])
    if thin is not None:
        lost = thin.write(weight, weight, measure=True)
        return weight, thin.norms(lost)
    norms = []
    with torch.autocast(weight.device.type, enabled=False):
        for rows, part in _parts(weight, update):
            wide, total = wide_sum(weight[rows], [(part, scale)])
            result = total.to(weight.dtype)
            if not is_finite(total) or not is_finite(result):
                return None
            norms.append(norms_of(wide, total, result))
            weight[rows] = result
    return weight, Norms(
        *(math.hypot(*each) for each in zip(*((n.weight, n.change, n.lost) for n in norms), strict=True))
    )


def _parts(weight: Tensor, update: Update) -> Iterator[tuple[slice | tuple[()], Update]]:
    """The update in pieces, each of some rows of the weight; in one piece if it cannot be cut."""
    if isinstance(update, FullUpdate) and update.kind.padding_idx is None and weight.numel() > _BLOCK:
        count = max(1, _BLOCK // (weight.numel() // len(weight)))
        for i in range(0, len(weight), count):
            rows = slice(i, i + count)
            yield rows, update.restored({"value": update.value.detach()[rows]})
    else:
        yield (), update


def check_survival(weights: Sequence[MergedWeight], least_survival: float) -> None:
    """Whether rounding left enough of each update.

    Raises:
        LorakitError: it left less than this share of some update's norm.
    """
    faint = {each.name: each.lost for each in weights if least_survival > 0 and each.lost > 1 - least_survival}
    if faint:
        raise LorakitError(
            listed(
                f"rounding would take more than {1 - least_survival:.0%} of the update in {len(faint)} of "
                f"{len(weights)} weights, so nothing is written: keep the adapter unmerged, merge into a base of "
                "float32, or allow it with a smaller least_survival=...",
                [
                    f"{name!r} would lose {share:.0%}"
                    for name, share in sorted(faint.items(), key=lambda each: -each[1])
                ],
            )
        )
