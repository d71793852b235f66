"""What an adapter does, in numbers: spectra and norms of ΔW, and how its directions lie to others and to the base's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.algebra import subspaces
from lorakit.algebra.low_rank import singular_values
from lorakit.errors import LorakitError
from lorakit.tables import table
from lorakit.values.adapter import Adapter, check, check_known
from lorakit.values.placement import kind_of
from lorakit.values.weight import AdapterWeight

Of = Literal["update", "A", "B"]
Weights = nn.Module | Mapping[str, Tensor]
"""A base: a model, or its weights by their names."""


def spectrum(adapter: Adapter) -> dict[str, Tensor]:
    """The singular values of each ΔW, decreasing, by QR of the factors: B·A is never formed.

    Returns:
        {name of the weight: (min(d, k, r),), or (E, …) of a stack}, in float64; all others of ΔW are zero.

    Raises:
        LorakitError: a scale is not known, or some ΔW is no product of two thin factors: all in one error.
    """
    return {weight.name: singular_values(*weight.update()) for weight in _products(adapter)}


def norm(adapter: Adapter) -> dict[str, float]:
    """‖ΔW‖ of each weight, the Frobenius norm; that of the whole adapter is `math.hypot` of them.

    Raises:
        LorakitError: as for `spectrum`.
    """
    return {name: float(values.norm()) for name, values in spectrum(adapter).items()}


@dataclass(frozen=True)
class OverlapWeight:
    """How much two adapters share of one weight's directions."""

    name: str
    phi_in: Tensor
    """(r_a, r_b): φ(i, j) of the first i and the first j directions that they read from, 0 to 1; (E, …) of a stack."""
    phi_out: Tensor
    """The same of the directions that they write to."""

    @property
    def inputs(self) -> float:
        """φ of all directions that they read from: 1 if one's lie in the other's."""
        return float(self.phi_in[..., -1, -1].mean())

    @property
    def outputs(self) -> float:
        """φ of all directions that they write to."""
        return float(self.phi_out[..., -1, -1].mean())


@dataclass(frozen=True)
class OverlapReport:
    """What `overlap` found; `print` it for a table."""

    weights: tuple[OverlapWeight, ...]

    def __str__(self) -> str:
        rows = [
            [
                w.name,
                *(f"{float(p[..., 0, 0].mean()):.3f}" for p in (w.phi_in, w.phi_out)),
                f"{w.inputs:.3f}",
                f"{w.outputs:.3f}",
            ]
            for w in self.weights
        ]
        headers = ["weight", "φ(1,1) in", "φ(1,1) out", "φ in", "φ out"]
        return table(headers, rows, right=headers[1:])


def overlap(a: Adapter, b: Adapter, *, of: Of = "update") -> OverlapReport:
    """The similarity of the subspaces that two adapters use, φ(i, j) = ‖Uᵢᵀ·Uⱼ‖²_F / min(i, j), weight by weight.

    Uᵢ are the first i singular directions (Hu et al. 2021, §7.2 and appendix G): 1 if one subspace holds the other, 0
    if they are orthogonal, and max(i, j)/d in the mean for random ones in d dimensions. Of weights that both change
    and where both do something; directions whose singular value is zero do not count.

    Args:
        a: an adapter.
        b: another, or the same.
        of: "update" takes the singular directions of ΔW, right ones for the inputs, left ones for the outputs; "A" and
            "B" those of the factor alone, as the paper does: the rows of A, or the columns of B, and the others as of
            the update.

    Raises:
        LorakitError: as for `spectrum`; or a weight has two shapes.
    """
    if of not in ("update", "A", "B"):
        raise LorakitError(f"of={of!r} must be 'update', 'A' or 'B'")
    mine, others = ({weight.name: weight for weight in _products(each, strict=False)} for each in (a, b))
    found, problems = [], []
    for name in mine.keys() & others.keys():
        pairs = [mine[name].update(), others[name].update()]
        if len({(*B.shape[:-1], A.shape[-1]) for B, A in pairs}) > 1:
            problems.append(f"{name!r} has two shapes")
            continue
        bases = [subspaces.directions(B, A) for B, A in pairs]
        if of == "A":
            bases = [(left, subspaces.span(A.mT)) for (left, _), (_, A) in zip(bases, pairs, strict=True)]
        elif of == "B":
            bases = [(subspaces.span(B), right) for (_, right), (B, _) in zip(bases, pairs, strict=True)]
        if all(part.shape[-1] for base in bases for part in base):
            (left_a, right_a), (left_b, right_b) = bases
            found.append(
                OverlapWeight(name, subspaces.similarity(right_a, right_b), subspaces.similarity(left_a, left_b))
            )
    check(f"comparing {a.name!r} with {b.name!r}", problems)
    order = {name: i for i, name in enumerate(mine)}
    return OverlapReport(tuple(sorted(found, key=lambda weight: order[weight.name])))


@dataclass(frozen=True)
class Amplification:
    """How one weight's update lies to the weight. Norms are Frobenius norms."""

    name: str
    rank: int
    change: float
    """‖ΔW‖."""
    before: float
    """‖Uᵀ·W·V‖: what W has in the directions of ΔW."""
    weight: float
    """‖W‖."""

    @property
    def factor(self) -> float:
        """‖ΔW‖ / ‖Uᵀ·W·V‖: how much ΔW amplifies directions that W has but does not stress; infinite if it has none."""
        return self.change / self.before if self.before else math.inf


def amplification(adapter: Adapter, base: Weights, *, rank: int | None = None) -> tuple[Amplification, ...]:
    """How ΔW lies to W: ‖ΔW‖ beside ‖Uᵀ·W·V‖, U and V its singular directions (Hu et al. 2021, §7.3, Table 7).

    Args:
        adapter: whose names are those of the base.
        base: the model without the adapter, or its weights by their names.
        rank: so many of the largest directions; by default all. `change` is then of these too.

    Raises:
        LorakitError: as for `spectrum`; or the base has no such weight, or one that it does not fit.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise LorakitError(f"rank={rank!r} must be an integer of at least 1, or None")
    found = []
    for weight, W in _with_base(adapter, base):
        B, A = weight.update()
        U, V = subspaces.directions(B, A)
        U, V = U[..., :rank], V[..., :rank]
        W = W.to(U.dtype)
        values = singular_values(B, A)[..., :rank]
        inner = torch.linalg.matrix_norm(U.mT @ W @ V)
        found.append(
            Amplification(weight.name, U.shape[-1], float(values.norm()), float(inner.norm()), float(W.norm()))
        )
    return tuple(found)


@dataclass(frozen=True)
class Intruders:
    """New singular directions of one weight."""

    name: str
    similarities: tuple[float, ...]
    """For each of the first singular directions of W + ΔW, how near the nearest of W's is: the cosine."""
    threshold: float

    @property
    def count(self) -> int:
        """How many are unlike all of W's."""
        return sum(value < self.threshold for value in self.similarities)


def intruders(adapter: Adapter, base: Weights, *, k: int = 10, threshold: float = 0.6) -> tuple[Intruders, ...]:
    """New directions among the largest of W + ΔW: left singular vectors that are like none of W's.

    Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228, algorithm 1.
    Both matrices are decomposed, one weight at a time: this costs d·k·min(d, k).

    Args:
        adapter: whose names are those of the base.
        base: the model without the adapter, or its weights by their names.
        k: how many of the largest directions are looked at.
        threshold: a direction whose cosine with each of W's is below it is new.

    Raises:
        LorakitError: as for `amplification`; k or threshold out of range.
    """
    if type(k) is not int or k < 1:
        raise LorakitError(f"k={k!r} must be an integer of at least 1")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise LorakitError(f"threshold={threshold!r} must be a number from 0 to 1")
    found = []
    for weight, W in _with_base(adapter, base):
        B, A = weight.update()
        W = W.to(B.dtype)
        for i, (before, change) in enumerate(zip(*_flat(W, B @ A), strict=True)):
            nearest = subspaces.nearest(before, before + change, k)
            name = weight.name if W.dim() == 2 else f"{weight.name}[{i}]"
            found.append(Intruders(name, tuple(nearest.tolist()), threshold))
    return tuple(found)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Each as a stack of matrices."""
    return [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]


def _products(adapter: Adapter, *, strict: bool = True) -> list[AdapterWeight]:
    """The weights whose ΔW is a finite product of two thin factors: all of them, or those that are."""
    check_known(adapter)
    found, problems = [], []
    for weight in adapter.weights:
        try:
            B, A = weight.product()
        except LorakitError as error:
            problems.append(str(error))
            continue
        if not bool(B.isfinite().all() and A.isfinite().all()):
            problems.append(f"{weight.name!r} holds NaN or infinity")
            continue
        found.append(weight)
    if strict:
        check(repr(adapter.name), problems)
    return found


def _with_base(adapter: Adapter, base: Weights) -> list[tuple[AdapterWeight, Tensor]]:
    """Each weight with the base's, seen as a matrix."""
    held = dict(base.named_parameters(remove_duplicate=False)) if isinstance(base, nn.Module) else base
    found, problems = [], []
    for weight in _products(adapter):
        W = held.get(weight.name)
        if W is None:
            problems.append(f"the base has no {weight.name!r}")
            continue
        try:
            matrix = kind_of(weight, tuple(W.shape)).matrix_of(W.detach())
        except LorakitError as error:
            problems.append(str(error))
            continue
        B, A = weight.product()
        if matrix.shape != (*B.shape[:-1], A.shape[-1]):
            problems.append(f"{weight.name!r} is {tuple(W.shape)} in the base, which ΔW does not fit")
            continue
        found.append((weight, matrix))
    check(f"{adapter.name!r} on this base", problems)
    return found
