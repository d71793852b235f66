"""Directions that matrices read from and write to, and how alike two sets of them are."""

import torch
from torch import Tensor

from lorakit.algebra import low_rank


def directions(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors of B·A: (..., d, r) and (..., k, r), in float64, by singular value.

    Without those whose value is zero, in a stack in all of its matrices.
    """
    U, values, Vh = low_rank.directions(B, A)
    r = int((values > 0).reshape(-1, values.shape[-1]).any(0).sum())
    return U[..., :r], Vh.mT[..., :r]


def span(M: Tensor) -> Tensor:
    """The left singular vectors of M: (..., n, m) that do not belong to zero, by value: (..., n, r), in float64."""
    U, values, _ = torch.linalg.svd(M.detach().double(), full_matrices=False)
    floor = max(M.shape[-2:]) * torch.finfo(values.dtype).eps * values.amax()
    kept: Tensor = U[..., : int((values > floor).reshape(-1, values.shape[-1]).any(0).sum())]
    return kept


def similarity(U: Tensor, V: Tensor) -> Tensor:
    """φ(i, j) = ‖Uᵢᵀ·Vⱼ‖²_F / min(i, j) for all i and j (Hu et al. 2021, §7.2); U: (..., n, a), V: (..., n, b).

    Returns:
        (..., a, b), from 0 to 1; the columns of U and of V must be orthonormal.
    """
    squares = (U.mT @ V).square().cumsum(-2).cumsum(-1)
    a, b = squares.shape[-2:]
    least = torch.minimum(torch.arange(1, a + 1)[:, None], torch.arange(1, b + 1)).to(squares)
    return (squares / least).clamp(0, 1)


def nearest(before: Tensor, after: Tensor, k: int) -> Tensor:
    """For each of the k largest left singular vectors of `after`, the largest |cosine| with any of `before`'s: (k,)."""
    U = torch.linalg.svd(before.double(), full_matrices=False).U
    V = torch.linalg.svd(after.double(), full_matrices=False).U[:, :k]
    cosines: Tensor = (U.mT @ V).abs().amax(0).clamp(max=1)
    return cosines
