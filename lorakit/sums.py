"""W + Σ t·ΔW for one weight: formed in at least 32 bits, rounded once, and known to be finite.

Where every update is a product of two thin factors, B·A is never formed: one `addmm` writes the sum, and several
adapters are one product, of their factors side by side. That such a sum is finite follows from a few norms, before
anything is formed or changed.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.algebra.low_rank import product_norm
from lorakit.layers import Kind, Update, accumulation_dtype
from lorakit.variants import FactoredUpdate

_BLOCK = 2**24
"""Numbers of a 16-bit weight that are widened at a time; on a CPU 2¹⁸, which stay in the cache of a core."""

Terms = list[tuple[Update, float]]
"""The updates of one weight, each with its strength."""


@dataclass(frozen=True)
class Norms:
    """Frobenius norms that tell what a sum did."""

    weight: float
    """‖W‖."""
    change: float
    """‖ΔW‖."""
    lost: float
    """‖rounded(W + ΔW) − (W + ΔW)‖."""


@dataclass(frozen=True)
class LowRankSum:
    """W + B·A in place of a weight, known to be finite and not formed yet."""

    kind: Kind
    B: Tensor
    """(d, Σr), or (E, d, Σr) of a stack."""
    A: Tensor
    """(Σr, k), or (E, Σr, k)."""

    weight: float
    """‖W‖."""

    def write(self, weight: Tensor, into: Tensor, *, measure: bool = False) -> float:
        """Into ← W + B·A, which may be the weight itself; if asked, what rounding took of it, as a norm."""
        with torch.autocast(weight.device.type, enabled=False):
            return _write(self.kind.matrix_of(weight), self.kind.matrix_of(into), self.B, self.A, measure)

    def norms(self, lost: float) -> Norms:
        """All norms, when the last is known."""
        return Norms(self.weight, product_norm(self.B, self.A), lost)


def low_rank_sum(weight: Tensor, terms: Terms) -> LowRankSum | None:
    """The sum as thin factors, if it is one and certain to be finite; None means: form it to see.

    All updates must be products of two factors in one matrix that lies in memory as the weight does. To be called
    without gradients.
    """
    kind = terms[0][0].kind
    if not weight.numel() or not weight.is_contiguous() or type(weight) not in (Tensor, nn.Parameter):
        return None
    if not all(isinstance(update, FactoredUpdate) and update.kind == kind for update, _ in terms):
        return None
    # Turned into a matrix and back it must be the very same memory. Then nothing was copied, so that the matrix can be
    # written, and nothing is held at zero, as an embedding's padding is.
    back = kind.weight_of(kind.matrix_of(weight), weight)
    if back.data_ptr() != weight.data_ptr() or back.shape != weight.shape or back.stride() != weight.stride():
        return None
    dtype = accumulation_dtype(weight.dtype)
    pairs = [cast(FactoredUpdate, update).product(weight, strength) for update, strength in terms]
    Bs, As = [B.detach().to(dtype) for B, _ in pairs], [A.detach().to(dtype) for _, A in pairs]
    B, A = (Bs[0], As[0]) if len(pairs) == 1 else (torch.cat(Bs, -1), torch.cat(As, -2))
    norm_W, norm_B, norm_A = torch.stack([_norm(weight), _norm(B), _norm(A)]).tolist()
    # No number of W is above ‖W‖, no partial sum of B·A above ‖B‖·‖A‖; the factor is room for rounding.
    finite = 4 * (norm_W + norm_B * norm_A) < torch.finfo(weight.dtype).max
    return LowRankSum(kind, B, A, norm_W) if finite else None


def wide_sum(weight: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """W and W + Σ t·ΔW in at least 32 bits, whatever the updates are."""
    wide = total = weight.to(accumulation_dtype(weight.dtype))
    for update, strength in terms:
        total = update.add_to(total, weight, strength)
    return wide, total


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. None is above the norm; where that says nothing, each is looked at."""
    return float(_norm(tensor)) <= torch.finfo(tensor.dtype).max or bool(tensor.isfinite().all())


def norms_of(wide: Tensor, total: Tensor, result: Tensor) -> Norms:
    """What there is to say of a weight, its sum in at least 32 bits, and what it became."""
    lost = 0.0 if result is total else float(_norm(result.to(total.dtype) - total))
    return Norms(float(_norm(wide)), float(_norm(total - wide)), lost)


def _write(W: Tensor, into: Tensor, B: Tensor, A: Tensor, measure: bool) -> float:
    if into.dim() == 3:
        lost = [_write(*parts, measure) for parts in zip(W, into, B, A, strict=True)]
        return float(torch.tensor(lost, dtype=torch.float64).norm())
    if into.stride(-1) != 1:  # the weight may lie in memory as the transpose
        W, into, B, A = W.mT, into.mT, A.mT, B.mT
    if into.dtype == A.dtype:
        if into.data_ptr() != W.data_ptr():
            into.copy_(W)
        into.addmm_(B, A)
        return 0.0
    count = max(1, (2**18 if into.device.type == "cpu" else _BLOCK) // into.shape[1])
    taken = []
    for i in range(0, len(into), count):
        rows = slice(i, i + count)
        total = W[rows].to(A.dtype).addmm_(B[rows], A)
        into[rows] = total  # rounds
        if measure:
            taken.append(_norm(total.sub_(into[rows])))
    return float(_norm(torch.stack(taken))) if taken else 0.0


def _norm(tensor: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.dtype)))
