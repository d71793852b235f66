"""Adapters of other ranks, and sums that drop a part of what they add: TIES, DARE."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.algebra.blend import dropped, elected, trimmed
from lorakit.algebra.low_rank import check_bounds, recompress, truncate
from lorakit.errors import LorakitError
from lorakit.tables import shape, table
from lorakit.values.adapter import Adapter, check, check_known, usual, weighted_sum
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, Rows
from lorakit.variants.checks import checked_integer

Weighted = Mapping[Adapter, float] | Iterable[tuple[Adapter, float]]
"""Adapters, each with a weight."""


@dataclass(frozen=True)
class ResizedWeight:
    """One weight of an adapter that was combined or resized."""

    name: str
    size: tuple[int, ...]
    """(d, k) of the weight as a matrix, (E, d, k) of a stack."""
    whole: int
    """The rank of the exact update: of a sum, all ranks together."""
    rank: int
    """The rank that it has."""
    error: float
    """‖ΔW − the exact update‖ / ‖the exact update‖ in Frobenius norm, from the singular values left out; 0 is exact."""
    norm: float
    """‖the exact update‖."""


@dataclass(frozen=True)
class ResizeReport:
    """What `combine`, `resize`, `ties` or `dare` made; `print` it for a table."""

    name: str
    weights: tuple[ResizedWeight, ...]
    kept: tuple[str, ...] = ()
    """Weights that are kept as they are: whole ones, and rows."""

    @property
    def parameters(self) -> int:
        """How many numbers the new factors hold."""
        return sum(
            torch.Size(each.size[:-2]).numel() * each.rank * (each.size[-2] + each.size[-1]) for each in self.weights
        )

    @property
    def error(self) -> float:
        """The relative error over all weights, as if they were one."""
        lost = math.hypot(*(each.error * each.norm for each in self.weights))
        norm = math.hypot(*(each.norm for each in self.weights))
        return lost / norm if norm else 0.0

    def __str__(self) -> str:
        rows = [[w.name, shape(w.size), str(w.whole), str(w.rank), f"{w.error:.3g}"] for w in self.weights]
        text = table(["weight", "matrix", "ranks", "rank", "error"], rows, right=("ranks", "rank", "error"))
        return f"{text}\n{self.name}: {self.parameters:,} numbers, error {self.error:.3g} in all"


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    name: str | None = None,
) -> tuple[Adapter, ResizeReport]:
    """The adapter with smaller ranks: for each weight the nearest ΔW of its rank in Frobenius norm, from the factors.

    A weight whose rank does not fall keeps its own tensors. Whole weights and rows, which have no rank, are kept.

    Args:
        adapter: whose ΔW are products of two thin factors.
        rank: at most so much for each weight.
        energy: for each weight the smallest rank that holds this share of ‖ΔW‖², from 0 to 1.
        error: for each weight the smallest rank with at most this relative error.
        name: of the new adapter; by default the same.

    Returns:
        The new adapter; and for each weight its rank and the relative error, which is that of the singular values
        left out (Eckart & Young 1936).

    Raises:
        LorakitError: a bound is out of range, a scale is not known, or some ΔW is no such product: all in one error.
    """
    check_known(adapter)
    check_bounds(rank, energy, error)
    weights: list[AdapterWeight] = []
    rows, kept, problems = [], [], []
    for weight in adapter.weights:
        if isinstance(weight.variant, Full | Rows):
            weights.append(weight)
            kept.append(weight.name)
            continue
        try:
            fresh, row = _resized(weight, rank, energy, error)
        except LorakitError as problem:
            problems.append(str(problem))
            continue
        weights.append(fresh)
        rows.append(row)
    check(f"resizing {adapter.name!r}", problems)
    new = adapter.name if name is None else name
    return (
        adapter.with_weights(weights, name=new, variant=usual(weights)),
        ResizeReport(new, tuple(rows), tuple(kept)),
    )


def _resized(
    weight: AdapterWeight, rank: int | None, energy: float | None, error: float | None
) -> tuple[AdapterWeight, ResizedWeight]:
    B, A = weight.update()
    whole, size = B.shape[-1], (*B.shape[:-1], A.shape[-1])
    found = recompress(B, A, rank, energy=energy, error=error)
    norm = float(found.singular_values.norm())
    if found.B.shape[-1] >= whole:
        return weight, ResizedWeight(weight.name, size, whole, whole, 0.0, norm)
    row = ResizedWeight(weight.name, size, whole, found.B.shape[-1], found.error, norm)
    return weight.with_factors(found.B, found.A), row


def ties(
    adapters: Weighted,
    *,
    density: float = 0.2,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    name: str | None = None,
) -> tuple[Adapter, ResizeReport]:
    """Trim, elect signs, and merge (TIES: Yadav et al. 2023, arXiv:2306.01708, §4), on ΔW itself.

    Of each weight·ΔW the largest entries are kept; each entry's sign is that of the sum; and those that have it are
    averaged. The result has no low rank, so it gets its best approximation; ΔW is formed for one weight at a time.
    (PEFT does the same to A and to B apart, whose product is then another matrix.)

    Args:
        adapters: {adapter: weight}, or pairs of them.
        density: the share of entries that is kept, above 0 and at most 1.
        rank: at most so much for each weight; one of the three bounds is needed.
        energy: as for `resize`.
        error: as for `resize`.
        name: of the new adapter; by default that of the first.

    Raises:
        LorakitError: as for `weighted_sum`, or no bound is given.
    """
    check_density(density)

    def merged(deltas: list[Tensor], weight: str) -> Tensor:
        return elected([trimmed(delta, density) for delta in deltas])

    return _dense(adapters, merged, rank, energy, error, name)


def dare(
    adapters: Weighted,
    *,
    density: float = 0.2,
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    name: str | None = None,
) -> tuple[Adapter, ResizeReport]:
    """Drop and rescale, then add (DARE: Yu et al. 2024, arXiv:2311.03099, §3), on ΔW itself.

    Of each ΔW every entry is kept with probability `density`, and divided by it, so that the sum is right in the mean.
    The result gets its best approximation of a rank; ΔW is formed for one weight at a time.

    Args:
        adapters: {adapter: weight}, or pairs of them.
        density: the probability that an entry is kept, above 0 and at most 1.
        seed: which are kept; the same seed, the same result.
        rank: at most so much for each weight; one of the three bounds is needed.
        energy: as for `resize`.
        error: as for `resize`.
        name: of the new adapter; by default that of the first.

    Raises:
        LorakitError: as for `weighted_sum`, or no bound is given.
    """
    check_density(density)
    seed = checked_integer("seed", seed, at_least=0, at_most=2**31 - 1)

    def merged(deltas: list[Tensor], weight: str) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(weight.encode()))
        kept = [dropped(delta, density, generator) for delta in deltas]
        return torch.stack(kept).sum(0)

    return _dense(adapters, merged, rank, energy, error, name)


def check_density(density: object) -> None:
    """Whether it is a share of entries that can be kept.

    Raises:
        LorakitError: it is not.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise LorakitError(f"density={density!r} must be above 0 and at most 1")


def _dense(
    adapters: Weighted,
    merged: Callable[[list[Tensor], str], Tensor],
    rank: int | None,
    energy: float | None,
    error: float | None,
    name: str | None,
) -> tuple[Adapter, ResizeReport]:
    """Merge the weighted ΔW of each weight as matrices, and give the result a rank."""
    check_bounds(rank, energy, error)
    if rank is None and energy is None and error is None:
        raise LorakitError("the result has no low rank of its own: give rank=, energy= or error=")
    terms = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    model = weighted_sum(terms, name)  # every check, and the weights of all
    rows, kept, weights = [], [], []
    for weight in model.weights:
        if isinstance(weight.variant, Full | Rows):  # one adapter's alone, or `weighted_sum` had refused it
            weights.append(weight)
            kept.append(weight.name)
            continue
        mine = [(w, factor) for adapter, factor in terms for w in adapter.weights if w.name == weight.name]
        pairs = [(w.update(), factor) for w, factor in mine]
        total = merged([(B @ A) * factor for (B, A), factor in pairs], weight.name)
        if not bool(total.isfinite().all()):
            raise LorakitError(f"{weight.name!r}: the sum holds NaN or infinity")
        found = truncate(total, rank, energy=energy, error=error)
        size, whole, norm = tuple(total.shape), min(total.shape[-2:]), float(found.singular_values.norm())
        rows.append(ResizedWeight(weight.name, size, whole, found.B.shape[-1], found.error, norm))
        weights.append(weight.with_factors(found.B, found.A))
    report = ResizeReport(model.name, tuple(rows), tuple(kept))
    return model.with_weights(weights, variant=usual(weights), format="lorakit"), report
