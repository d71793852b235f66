"""What is in an adapter: its ranks, scales, norms and spectra, and what is wrong with it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.algebra import Spectrum
from lorakit.algebra.low_rank import singular_values
from lorakit.errors import printable
from lorakit.values.adapter import Adapter
from lorakit.values.weight import UNRESOLVED, AdapterWeight
from lorakit.variants import Full, Rows

_LONGEST = 300
"""Characters of the base's name, which a file may have of any length."""


@dataclass(frozen=True)
class InspectedWeight:
    """One weight of an adapter."""

    name: str
    method: str
    """The variant's name."""
    size: tuple[int, ...]
    """(d, k) of the weight as a matrix, (E, d, k) of a stack; of what is no product, the first tensor's shape."""
    numbers: int
    rank: int | None
    alpha: float | None
    """None where it is not known, or has no meaning."""
    scale: float | None
    state: str
    """"" if it is in order; "not finite", "zero" (no effect at all) otherwise."""
    spectrum: tuple[float, ...] | None
    """The singular values of ΔW, decreasing, as many as the rank; of a stack the root of the sum of squares of each.
    None if ΔW is no product of two thin factors, or not finite."""

    @property
    def norm(self) -> float | None:
        """‖ΔW‖, the Frobenius norm."""
        return None if self.spectrum is None else math.hypot(*self.spectrum)

    @property
    def effective_rank(self) -> float | None:
        """How many equal directions would be as spread out (Roy & Vetterli 2007)."""
        return None if self.spectrum is None else self._spectrum().effective_rank

    def rank_for_energy(self, share: float) -> int | None:
        """The smallest rank that holds this share of ‖ΔW‖²; 0 of nothing."""
        return None if self.spectrum is None else self._spectrum().rank_for_energy(share)

    def _spectrum(self) -> Spectrum:
        assert self.spectrum is not None
        values = torch.tensor(self.spectrum, dtype=torch.float64)
        return Spectrum(values, (len(values), len(values)), torch.float64)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    name: str
    format: str
    base: str | None
    """The model it was trained on, if the file says."""
    method: str
    missing: tuple[str, ...]
    """What the file does not hold and norms depend on: they are then those of a scale of 1."""
    left_out: tuple[str, ...]
    dtypes: dict[str, int]
    """How many numbers of each dtype."""
    weights: tuple[InspectedWeight, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return sum(weight.numbers for weight in self.weights)

    @property
    def dead(self) -> tuple[str, ...]:
        """Weights on which it has no effect."""
        return tuple(weight.name for weight in self.weights if weight.state == "zero")

    @property
    def broken(self) -> tuple[str, ...]:
        """Weights with NaN or infinity."""
        return tuple(weight.name for weight in self.weights if weight.state == "not finite")

    def rank_for_energy(self, share: float) -> int | None:
        """The smallest rank that holds this share of ‖ΔW‖² in every weight; None if no weight has a spectrum."""
        ranks = [rank for weight in self.weights if (rank := weight.rank_for_energy(share)) is not None]
        return max(ranks) if ranks else None

    def to_json(self, share: float = 0.99) -> dict[str, Any]:
        """All of it, for `json.dumps`."""
        weights = [
            {
                **asdict(weight),
                "norm": weight.norm,
                "effective_rank": weight.effective_rank,
                "rank_for_energy": weight.rank_for_energy(share),
            }
            for weight in self.weights
        ]
        return {
            **asdict(self),
            "numbers": self.numbers,
            "dead": self.dead,
            "broken": self.broken,
            "energy": share,
            "suggested_rank": self.rank_for_energy(share),
            "weights": weights,
        }


def inspect(adapter: Adapter) -> Inspection:
    """Look at every weight of an adapter; B·A is never formed."""
    dtypes: Counter[str] = Counter()
    for weight in adapter.weights:
        for tensor in weight.tensors.values():
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    theirs = adapter.facts.get("peft")
    base = (theirs.get("base_model_name_or_path") if isinstance(theirs, Mapping) else None) or adapter.facts.get("base")
    known = "alpha" not in adapter.missing
    return Inspection(
        adapter.name,
        adapter.format,
        printable(base[:_LONGEST]) if isinstance(base, str) else None,
        str(adapter.variant) if known else type(adapter.variant).__name__,
        adapter.missing,
        adapter.left_out,
        dict(dtypes),
        tuple(_inspected(weight, known) for weight in adapter.weights),
    )


def _inspected(weight: AdapterWeight, known: bool) -> InspectedWeight:
    tensors, variant = weight.tensors, weight.variant
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    product = None
    known_here = not isinstance(variant, Full | Rows) and weight.entry.kind not in UNRESOLVED
    if known_here and variant.product(tensors, 2 if weight.stacked else 1) is not None:
        product = weight.product()
    size = tuple(next(iter(tensors.values())).shape)
    values: tuple[float, ...] | None = None
    state = "" if finite else "not finite"
    if product is not None:
        B, A = product
        size = (*B.shape[:-1], A.shape[-1])
        finite = finite and all(bool(factor.isfinite().all()) for factor in product)  # the scale may be absurd
        state = "" if finite else "not finite"
        if finite:
            values = _spectrum(B, A)
            state = "zero" if not any(values) else ""
    rank: Any = getattr(variant, "rank", None)
    alpha: Any = getattr(variant, "alpha", None)
    return InspectedWeight(
        weight.name,
        type(variant).__name__,
        size,
        sum(tensor.numel() for tensor in tensors.values()),
        rank,
        (rank if alpha is None else alpha) if known and hasattr(variant, "alpha") else None,
        getattr(variant, "scale", None) if known else None,
        state,
        values,
    )


def _spectrum(B: Tensor, A: Tensor) -> tuple[float, ...]:
    values = singular_values(B, A)
    squares = values.square().reshape(-1, values.shape[-1]).sum(0)
    return tuple(squares.sqrt().tolist())
