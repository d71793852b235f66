"""The largest singular directions of a large matrix, without its whole decomposition.

A few random mixtures of the columns span nearly what the largest singular directions span. Multiplying by W·Wᵀ makes
the large ones stand out more, and in that small space the decomposition is cheap (Halko, Martinsson & Tropp 2011,
"Finding structure with randomness", arXiv:0909.4061, algorithms 4.4 and 5.1). How good it is, is measured.
"""

import math

import torch
from torch import Tensor

from lorakit.algebra.decompose import Decomposition, check_rank
from lorakit.algebra.low_rank import check_bounds
from lorakit.algebra.rank import check_overflow, checked_matrix

_EXTRA = 16
"""Mixtures beyond the rank (p in the paper, which takes 5 to 10)."""
_EXACT = 256
"""Matrices whose smaller side is at most this are decomposed as a whole: it costs as little."""
_FIRST = 32
"""The rank that is tried first where an error is asked for."""
_BLOCK = 2**20
"""Numbers of B·A that are formed at a time, to measure what it lacks."""


def randomized_svd(W: Tensor, rank: int, *, iterations: int = 4, seed: int = 0) -> Decomposition:
    """W ≈ B·A at a rank by random sampling: nearly the best there is, at a cost of order d·k·rank.

    Args:
        W: (d, k), real and floating-point.
        rank: from 1 to min(d, k).
        iterations: multiplications by W·Wᵀ. The slower the singular values fall, the more it takes; 4 is ample.
        seed: of the random mixtures; the same for the same result.

    Returns:
        B: (d, rank) and A: (rank, k), as `decompose` has them; `error` is ‖W − B·A‖_F as measured, and
        `singular_values` are the `rank` largest.

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers, or rank is out of range.
    """
    M = checked_matrix(W)
    check_rank(M, rank)
    with torch.autocast(M.device.type, enabled=False):
        U, values, Vh = _largest(M, rank, iterations, seed)
        check_overflow(values, "W")
        root = values.sqrt()
        B, A = (U * root).contiguous(), (root[:, None] * Vh).contiguous()
        return Decomposition(B, A, residual(M, B, A), values)


def approximate(
    W: Tensor, rank: int | None = None, *, energy: float | None = None, error: float | None = None, seed: int = 0
) -> Decomposition:
    """W ≈ B·A at the smallest rank that meets the bounds; by random sampling where W is large and the rank small.

    Several bounds hold together: the smallest rank counts. Without any, and with energy=1 or error=0, it is the
    numerical rank: singular values of at most max(d, k)·ε·σ₁ are rounding.

    Args:
        W: (d, k), real and floating-point.
        rank: at most so many.
        energy: the smallest rank that holds this share of ‖W‖², from 0 to 1.
        error: the smallest rank with at most this relative error, 0 or more.
        seed: of the random sampling.

    Returns:
        B, A, the measured `error` ‖W − B·A‖_F, and the singular values that were found. At least rank 1.

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers, or a bound is out of range.
    """
    check_bounds(rank, energy, error)
    M = checked_matrix(W)
    least = min(M.shape)
    rank = None if rank is None else min(rank, least)
    bounded = energy is not None or error is not None or rank is None
    # Of two shares that may be left out, the larger makes for the smaller rank.
    shares = [1.0 - energy] if energy is not None else []
    shares += [error**2] if error is not None else []
    share = max(shares, default=0.0)
    size = min(rank or least, _FIRST) if bounded else rank or least
    while least > _EXACT and 4 * (size + _EXTRA) <= least:
        found = randomized_svd(M, size, seed=seed)
        if not bounded:
            return found
        if found.error <= _allowed(M, share) or float(found.singular_values[-1]) <= _rounding(M, found.singular_values):
            return _cut(M, found, share)
        if size == rank:
            return found
        size = min(2 * size, rank or least)
    U, values, Vh = torch.linalg.svd(M, full_matrices=False)
    check_overflow(values, "W")
    most = len(values) if rank is None else rank
    root = values[:most].sqrt()
    B, A = (U[:, :most] * root).contiguous(), (root[:, None] * Vh[:most]).contiguous()
    whole = Decomposition(B, A, math.hypot(*values[most:].tolist()), values)
    del U, Vh
    return _cut(M, whole, share) if bounded else whole._replace(error=residual(M, whole.B, whole.A))


def residual(M: Tensor, B: Tensor, A: Tensor) -> float:
    """‖M − B·A‖_F, of which no more than a few rows are formed at a time."""
    if M.stride(-1) != 1:  # it lies in memory as its transpose
        M, B, A = M.mT, A.mT, B.mT
    rows = max(1, _BLOCK // M.shape[1])
    block = torch.empty_like(M[:rows])  # one for all, and numbers in place of tensors: malloc would leave holes
    norms = []
    for i in range(0, len(M), rows):
        part = M[i : i + rows]
        torch.addmm(part, B[i : i + rows], A, alpha=-1, out=block[: len(part)])
        norms.append(float(torch.linalg.vector_norm(block[: len(part)])))
    return math.hypot(*norms)


def _largest(M: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triplets: (d, rank), (rank,), (rank, k)."""
    size = min(rank + _EXTRA, *M.shape)
    generator = torch.Generator("cpu").manual_seed(seed)
    mixtures = torch.randn(M.shape[1], size, generator=generator).to(M)
    # Orthonormal after every product, so that small directions are not lost beside the large ones.
    Q = torch.linalg.qr(M @ mixtures).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(M.mT @ Q).Q
        Q = torch.linalg.qr(M @ Q).Q
    U, values, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return Q @ U[:, :rank], values[:rank], Vh[:rank]


def _allowed(M: Tensor, share: float) -> float:
    """The error that may be left, as a norm."""
    return math.sqrt(share) * float(torch.linalg.vector_norm(M))


def _rounding(M: Tensor, values: Tensor) -> float:
    """Up to which size a singular value may be mere rounding, as `Spectrum.default_rtol` has it for these dtypes."""
    return max(M.shape) * torch.finfo(M.dtype).eps * float(values[0])


def _cut(M: Tensor, found: Decomposition, share: float) -> Decomposition:
    """The smallest rank that leaves no more than this share of the square, and rounding; at least 1; measured again."""
    values, r, left = found.singular_values.tolist(), found.B.shape[1], found.error
    rounding, allowed = _rounding(M, found.singular_values), _allowed(M, share)
    while r > 1 and ((more := math.hypot(left, values[r - 1])) <= allowed or values[r - 1] <= rounding):
        r, left = r - 1, more
    B, A = found.B[:, :r].contiguous(), found.A[:r].contiguous()
    return Decomposition(B, A, residual(M, B, A), found.singular_values)
