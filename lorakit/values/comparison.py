"""Two adapters side by side: what each changes, how alike the changes are, and whether they collide."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.algebra.low_rank import Pair, concatenate, singular_values
from lorakit.errors import LorakitError
from lorakit.tables import table
from lorakit.values.adapter import Adapter, check_known
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full


@dataclass(frozen=True)
class ComparedWeight:
    """One weight that both change. Norms are Frobenius norms."""

    name: str
    norms: tuple[float, float]
    """‖ΔW‖ of each."""
    distance: float
    """‖ΔWₐ − ΔW_b‖ / max(‖ΔWₐ‖, ‖ΔW_b‖): 0 is the same update."""
    cosine: float
    """⟨ΔWₐ, ΔW_b⟩ / (‖ΔWₐ‖·‖ΔW_b‖): −1 is opposite, 0 unrelated; 0 where one is zero."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print` it for a table."""

    weights: tuple[ComparedWeight, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Weights that only the first changes, and only the second; factors whose product is zero change none."""
    unlike: tuple[str, ...]
    """Weights of both that cannot be compared, with the reason."""
    equal: tuple[str, ...] = ()
    """Weights of both that are no products of factors (whole ones, DoRA), and the same tensor for tensor."""

    @property
    def distance(self) -> float:
        """The same over all weights that were compared, as if they were one."""
        parts = [(w.distance * max(w.norms)) ** 2 for w in self.weights]
        most = max(sum(w.norms[i] ** 2 for w in self.weights) for i in (0, 1)) if self.weights else 0.0
        return math.sqrt(sum(parts) / most) if most else 0.0

    @property
    def same(self) -> bool:
        """Whether both are the same adapter, to the precision of 16 bits."""
        return not any(self.only) and not self.unlike and self.distance < 2**-8

    def __str__(self) -> str:
        rows = [[w.name, *(f"{n:.4g}" for n in w.norms), f"{w.distance:.3g}", f"{w.cosine:.3f}"] for w in self.weights]
        headers = ["weight", "‖ΔW‖ of A", "of B", "distance", "cosine"]
        return table(headers, rows, right=headers[1:])


def compare(a: Adapter, b: Adapter) -> Comparison:
    """Compare two adapters weight by weight, from their factors alone.

    Names must be of one kind: flattened ones are first found again in those of a model (`renamed_for`).

    Raises:
        LorakitError: a scale is not known, or the names are of two kinds.
    """
    for each in (a, b):
        check_known(each)
    if a.naming != b.naming:
        raise LorakitError(
            f"{a.name!r} has names as {a.naming or 'a model'} has them, {b.name!r} as {b.naming or 'a model'}: give "
            "both the model's names first (renamed_for; --names on the command line)"
        )
    left = {weight.name: weight for weight in a.weights}
    right = {weight.name: weight for weight in b.weights}
    found, unlike, equal = [], [], []
    for name, mine in left.items():
        if name not in right:
            continue
        if _is_equal(mine, right[name]):
            equal.append(name)
            continue
        try:
            found.append(_compared(name, mine, right[name]))
        except LorakitError as error:
            unlike.append(str(error))
    only = tuple(
        tuple(name for name, weight in mine.items() if name not in others and not has_no_effect(weight))
        for mine, others in ((left, right), (right, left))
    )
    return Comparison(tuple(found), (only[0], only[1]), tuple(unlike), tuple(equal))


def _is_equal(mine: AdapterWeight, other: AdapterWeight) -> bool:
    """Whether two updates that are no products are one and the same; whole weights may be of two dtypes."""
    if mine.variant.product(mine.tensors, 1) is not None or type(mine.variant) is not type(other.variant):
        return False
    if not isinstance(mine.variant, Full) and mine.variant != other.variant:
        return False
    return mine.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name].to(tensor.dtype)) for name, tensor in mine.tensors.items()
    )


def has_no_effect(weight: AdapterWeight) -> bool:
    """Whether its ΔW is known to be zero: some formats have factors for all layers of a kind, if for one."""
    try:
        factors = weight.product()
    except LorakitError:
        return False
    return any(not bool(factor.count_nonzero()) for factor in factors)


def _compared(name: str, mine: AdapterWeight, other: AdapterWeight) -> ComparedWeight:
    pairs = [mine.product(), other.product()]
    shapes = [(*B.shape[:-1], A.shape[-1]) for B, A in pairs]
    if shapes[0] != shapes[1]:
        raise LorakitError(f"{name!r} is {shapes[0]} in one and {shapes[1]} in the other")
    pairs = [(B.double(), A.double()) for B, A in pairs]
    if not all(bool(factor.isfinite().all()) for pair in pairs for factor in pair):
        raise LorakitError(f"{name!r} holds NaN or infinity")
    norms = float(_norm(pairs[0])), float(_norm(pairs[1]))
    distance = float(_norm(concatenate(pairs, [1.0, -1.0])))
    (B1, A1), (B2, A2) = pairs
    inner = float(((B1.mT @ B2) * (A1 @ A2.mT)).sum())
    cosine = inner / (norms[0] * norms[1]) if all(norms) else 0.0
    return ComparedWeight(name, norms, distance / max(norms) if any(norms) else 0.0, max(-1.0, min(1.0, cosine)))


def _norm(pair: Pair) -> Tensor:
    """‖B·A‖, from the singular values: a sum that cancels is then small beside its terms, and right."""
    values: Tensor = singular_values(*pair).norm()
    return values
