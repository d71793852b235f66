"""A matrix as a product of two thin ones, by the singular value decomposition W = U·diag(σ)·Vᵀ."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.algebra.rank import check_overflow, checked_matrix
from lorakit.errors import LorakitError


class Decomposition(NamedTuple):
    """W ≈ B·A, and what was lost."""

    B: Tensor
    """(d, rank): U·√σ."""
    A: Tensor
    """(rank, k): √σ·Vᵀ."""
    error: float
    """‖W − B·A‖_F: the root of the sum of the squared singular values left out."""
    singular_values: Tensor
    """(min(d, k),) all of W's, decreasing."""


def decompose(W: Tensor, rank: int) -> Decomposition:
    """The best approximation B·A of W: (d, k) at a rank: no other matrix of that rank is nearer in Frobenius norm.

    Each singular value is split evenly, √σ to B and √σ to A, so neither factor dwarfs the other.
    Source: Eckart & Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.

    Args:
        W: (d, k), real and floating-point.
        rank: 1 to min(d, k).

    Returns:
        B: (d, rank) and A: (rank, k), in float64 if W is, else float32, on W's device and without gradient; and
        `error` and `singular_values`. At W's own rank the error is of the size of rounding.

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers, or rank is out of range.
    """
    M = checked_matrix(W)
    check_rank(M, rank)
    U, values, Vh = torch.linalg.svd(M, full_matrices=False)
    check_overflow(values, "W")
    root = values[:rank].sqrt()
    lost = math.hypot(*values[rank:].tolist())
    # Products, not views: a view of U or Vᵀ would keep all of it in memory.
    return Decomposition(U[:, :rank] * root, root[:, None] * Vh[:rank], lost, values)


def check_rank(M: Tensor, rank: object) -> None:
    """Whether a matrix can have an approximation of this rank.

    Raises:
        LorakitError: it is no integer from 1 to the smaller side.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(M.shape):
        raise LorakitError(
            f"rank={rank!r} must be an integer from 1 to {min(M.shape)}, the smaller side of W: {tuple(M.shape)}"
        )


def factored_singular_values(B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """The singular values of scale·B·A, without forming that d×k matrix.

    With B = Q₁·R₁ and Aᵀ = Q₂·R₂ they are those of R₁·R₂ᵀ, which is at most r×r. The cost is of order (d + k)·r².

    Args:
        B: (d, r).
        A: (r, k).
        scale: any finite number; singular values are never negative, so its sign is of no consequence.

    Returns:
        (min(d, k, r),) decreasing, in float64 if B or A is, else float32. The other singular values are zero.

    Raises:
        LorakitError: B and A are not matrices of finite real numbers that can be multiplied, or scale is not finite.
    """
    B, A = checked_matrix(B, "B"), checked_matrix(A, "A")
    if B.shape[1] != A.shape[0] or B.device != A.device:
        raise LorakitError(
            f"cannot multiply B: {tuple(B.shape)} on {B.device} and A: {tuple(A.shape)} on {A.device}; "
            "B is (d, r) and A is (r, k), on one device"
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise LorakitError(f"scale={scale!r} must be a finite number")
    dtype = torch.promote_types(B.dtype, A.dtype)
    R1 = torch.linalg.qr(B.to(dtype), mode="r").R  # (min(d, r), r)
    R2 = torch.linalg.qr(A.to(dtype).T, mode="r").R  # (min(k, r), r)
    with torch.autocast(B.device.type, enabled=False):  # which would multiply in half precision
        core = R1 @ R2.T
    check_overflow(core, "B·A")
    values: Tensor = torch.linalg.svdvals(core) * abs(scale)
    check_overflow(values, "scale·B·A")
    return values
