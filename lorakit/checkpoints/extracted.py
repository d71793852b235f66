"""What `extract` took of a fine-tune, and what it did not."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.checkpoints.checkpoint import listed
from lorakit.tables import shape as shown
from lorakit.tables import table


class ExtractedWeight(NamedTuple):
    """What was taken of one weight. Norms are Frobenius norms."""

    name: str
    seen: str
    """As which kind of layer: "Linear", "Embedding"; "whole" if all of it is kept."""
    by: str
    """What told so: "module", "name", "bias" or "shape"."""
    shape: tuple[int, ...]
    rank: int
    """0 if all of it is kept."""
    change: float
    """‖ΔW‖."""
    error: float
    """‖ΔW − B·A‖ / ‖ΔW‖, as measured."""


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` took, and what it did not."""

    weights: tuple[ExtractedWeight, ...]
    unchanged: int
    """How many tensors are the same in both."""
    mixed: int
    """How many changed ones are of two dtypes: their change holds what rounding to the coarser one took."""
    not_captured: tuple[tuple[str, str], ...]
    """Names, and why each is no part of the adapter: in one of the two alone, of another shape, not in targets."""

    @property
    def error(self) -> float:
        """‖ΔW − B·A‖ / ‖ΔW‖ over all weights of the adapter together; what is not captured is not in it."""
        change = math.hypot(*(weight.change for weight in self.weights))
        return math.hypot(*(weight.change * weight.error for weight in self.weights)) / change if change else 0.0

    def __str__(self) -> str:
        rows = [
            [
                w.name,
                f"{w.seen} (by {w.by})",
                shown(w.shape),
                str(w.rank or "whole"),
                f"{w.change:.3g}",
                f"{w.error:.2g}",
            ]
            for w in self.weights
        ]
        heads = ["weight", "seen as", "shape", "rank", "change", "error"]
        lines = [table(heads, rows, right=("rank", "change", "error"))]
        lines.append(f"error in all: {self.error:.2g}; {self.unchanged} tensors are unchanged")
        if self.mixed:
            lines.append(f"{self.mixed} are of two dtypes: their change holds what rounding to the coarser one took")
        if self.not_captured:
            lines.append(listed("not captured:", [f"{name!r} {why}" for name, why in self.not_captured]))
        return "\n".join(lines)
