"""Matrices given as two thin factors, B·A with B: (..., d, r) and A: (..., r, k), handled without forming them.

With B = Q₁·R₁ and Aᵀ = Q₂·R₂ all that matters lies in the small core R₁·R₂ᵀ: its singular values are those of B·A, and
its singular vectors, turned by Q₁ and Q₂, those of B·A. The cost is of order (d + k)·r². Leading axes are a stack, of
which each matrix is one by itself.

Everything is computed in 64 bits: where two terms nearly cancel, their sum is small beside the factors, and the error
of a QR decomposition is a share of the factors. (Gram matrices BᵀB would be cheaper and lose half of the digits.)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError

Pair = tuple[Tensor, Tensor]
"""B and A."""


class Recompressed(NamedTuple):
    """The best approximation of a product at a smaller rank."""

    B: Tensor
    """(..., d, rank): U·√σ, in the dtype of the factors it was made of."""
    A: Tensor
    """(..., rank, k): √σ·Vᵀ. Where σ is zero so is B's column; A's row is not, so that training can take it up."""
    error: float
    """‖B·A − its approximation‖ / ‖B·A‖ in Frobenius norm, over the whole stack; 0 of nothing."""
    singular_values: Tensor
    """(..., min(d, r, k)) all of the product's, decreasing, in float64."""


def concatenate(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Σ weight·B·A as one product, exactly: the factors side by side, the weights in B; its rank is the sum of ranks.

    Raises:
        LorakitError: no pair, or products that do not have one shape.
    """
    shapes = {(*B.shape[:-1], A.shape[-1]) for B, A in pairs}
    if len(shapes) != 1:
        raise LorakitError(f"{len(pairs)} products of the shapes {sorted(shapes)} have no sum; give products of one")
    scaled = [B if weight == 1 else B * weight for (B, _), weight in zip(pairs, weights, strict=True)]
    return torch.cat(scaled, -1), torch.cat([A for _, A in pairs], -2)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """(..., min(d, r, k)) of B·A, decreasing, in float64; the others are zero.

    Raises:
        LorakitError: a factor is not finite.
    """
    wide = _in_64_bits(B, A)
    _check_finite(wide)
    R1, R2 = (torch.linalg.qr(factor, mode="r").R for factor in wide)
    return _without_rounding(torch.linalg.svdvals(R1 @ R2.mT), R1, R2)


def product_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖_F from the small Gram matrices, tr(BᵀB·AAᵀ): cheap, and good to half of the digits where terms cancel."""
    wide_B, wide_At = _in_64_bits(B, A)
    return float(((wide_B.mT @ wide_B) * (wide_At.mT @ wide_At)).sum().clamp(min=0).sqrt())


def recompress(
    B: Tensor, A: Tensor, rank: int | None = None, *, energy: float | None = None, error: float | None = None
) -> Recompressed:
    """The nearest product of a smaller rank in Frobenius norm (Eckart & Young 1936).

    Args:
        B: (..., d, r).
        A: (..., r, k).
        rank: at most so many; also every rank that there is, if it is larger or None.
        energy: the smallest rank that holds this share of ‖B·A‖², from 0 to 1.
        error: the smallest rank with at most this relative error, 0 or more.

    Several of these bound the rank together: the smallest counts. A stack has one rank for all of its matrices.

    Raises:
        LorakitError: a bound is out of range, or a factor is not finite.
    """
    check_bounds(rank, energy, error)
    Q1, U, values, Vh, Q2 = _core(B, A)
    r, lost = _cut(values, rank, energy, error)
    root = values[..., :r].sqrt()
    # Both as rows times rows: laid out as torch returns U, the same product takes seven times as long.
    left = (U[..., :r] * root.unsqueeze(-2)).mT.contiguous() @ Q1.mT
    right = Vh[..., :r, :] * root.where(root > 0, 1).unsqueeze(-1) @ Q2.mT
    dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
    return Recompressed(left.mT.to(B.device, dtype), right.to(A.device, dtype), lost, values)


def truncate(
    W: Tensor, rank: int | None = None, *, energy: float | None = None, error: float | None = None
) -> Recompressed:
    """`recompress` of a matrix that is formed, (..., d, k) and finite: one decomposition."""
    check_bounds(rank, energy, error)
    U, values, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    r, lost = _cut(values, rank, energy, error)
    root = values[..., :r].sqrt()
    B, A = U[..., :r] * root.unsqueeze(-2), root.where(root > 0, 1).unsqueeze(-1) * Vh[..., :r, :]
    dtype = torch.promote_types(W.dtype, torch.float32)
    return Recompressed(B.to(dtype), A.to(dtype), lost, values)


def directions(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U: (..., d, n), σ: (..., n), Vᵀ: (..., n, k) of B·A with n = min(d, r, k), in float64, σ decreasing.

    Raises:
        LorakitError: a factor is not finite.
    """
    Q1, U, values, Vh, Q2 = _core(B, A)
    return Q1 @ U, values, Vh @ Q2.mT


def _core(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q₁, U, σ, Vᵀ and Q₂ with B·A = Q₁·U·diag(σ)·Vᵀ·Q₂ᵀ, in 64 bits."""
    wide_B, wide_At = _in_64_bits(B, A)
    _check_finite((wide_B, wide_At))
    Q1, R1 = torch.linalg.qr(wide_B)
    Q2, R2 = torch.linalg.qr(wide_At)
    U, values, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    return Q1, U, _without_rounding(values, R1, R2), Vh, Q2


def _check_finite(factors: Pair) -> None:
    # A norm tells at a tenth of the price; only in 64 bits can one overflow where no number is infinite.
    if not all(math.isfinite(factor.norm()) or bool(factor.isfinite().all()) for factor in factors):
        raise LorakitError("the factors, or their scale, hold NaN or infinity: there is nothing to approximate")


def check_bounds(rank: int | None, energy: float | None, error: float | None) -> None:
    """Whether these can bound a rank.

    Raises:
        LorakitError: one is out of range.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise LorakitError(f"rank={rank!r} must be an integer of at least 1, or None")
    for name, share, most in (("energy", energy, 1.0), ("error", error, math.inf)):
        if share is None:
            continue
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= most:
            raise LorakitError(f"{name}={share!r} must be a number from 0 to {most:g}")


def _cut(values: Tensor, rank: int | None, energy: float | None, error: float | None) -> tuple[int, float]:
    """How many singular values to keep, at least one, and the relative error that leaves."""
    squares = values.square().reshape(-1, values.shape[-1]).sum(0)
    # left[r] is what rank r leaves out, summed from the small end: the large ones would swallow it.
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).tolist()
    r = len(left) - 1 if rank is None else min(rank, len(left) - 1)
    allowed = [(1 - energy) * left[0]] if energy is not None else []
    allowed += [error**2 * left[0]] if error is not None else []
    for most in allowed:
        r = min(r, next(i for i, lost in enumerate(left) if lost <= most))
    r = max(r, 1)
    return r, math.sqrt(left[r] / left[0]) if left[0] else 0.0


def _without_rounding(values: Tensor, R1: Tensor, R2: Tensor) -> Tensor:
    """Singular values with those at zero that are mere rounding: a cancelled sum is nothing, and not noise."""
    norms = torch.linalg.matrix_norm(R1) * torch.linalg.matrix_norm(R2)
    floor = 8 * torch.finfo(values.dtype).eps * norms.unsqueeze(-1)
    return torch.where(values > floor, values, 0.0)


def _in_64_bits(B: Tensor, A: Tensor) -> Pair:
    """B and Aᵀ, where the device has 64 bits; else on the CPU."""
    where = B.device if B.device.type in ("cpu", "cuda") else torch.device("cpu")
    return B.detach().to(where, torch.float64), A.detach().mT.to(where, torch.float64)
