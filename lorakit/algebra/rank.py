"""How many dimensions a matrix really uses: its singular values, and five ways of counting them.

Each function is one reading of a `Spectrum`. To take several readings of one matrix, keep `Spectrum.of(W)`: the
singular values are by far the costliest part, of order d·k·min(d, k).
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lorakit.errors import LorakitError


@final
@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values σ₁ ≥ σ₂ ≥ … of a d×k matrix. Make one by `Spectrum.of(W)`.

    Args:
        values: (min(d, k),) the singular values, decreasing; float64 if W is, else float32, on W's device.
        shape: (d, k).
        dtype: W's own; what was rounded to fewer bits has a coarser rank.
    """

    values: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, W: Tensor) -> "Spectrum":
        """The spectrum of W: (d, k), real and floating-point of any precision; no gradient flows through it.

        Raises:
            LorakitError: W is not a non-empty matrix of finite real numbers; the message says what it is.
        """
        M = checked_matrix(W)
        values = torch.linalg.svdvals(M)
        check_overflow(values, "W")
        return cls(values, (M.shape[0], M.shape[1]), W.dtype)

    @property
    def default_rtol(self) -> float:
        """The share of σ₁ below which a singular value may be mere rounding.

        max(d, k)·ε of the dtype in which the singular values were computed, as in numpy and MATLAB, and at least ε of
        W's own dtype. For float32 and float64 that is the first. For half precision it is the second: rounding each
        entry by a share of at most u = ε/2 adds a matrix E of independent errors, with
        ‖E‖₂ ≈ u·‖W‖_F·(1/√d + 1/√k) ≤ 2u·‖W‖₂ = ε·σ₁, and by Weyl's inequality no singular value moves further.
        max(d, k)·ε would pass 1, and every rank be 0, from a bfloat16 matrix of 128 rows on. Float16 is coarser than
        its ε below 6·10⁻⁵: give `rtol` for a matrix of such numbers.
        """
        return max(max(self.shape) * torch.finfo(self.values.dtype).eps, torch.finfo(self.dtype).eps)

    def numerical_rank(self, rtol: float | None = None) -> int:
        """See `lorakit.algebra.numerical_rank`."""
        if rtol is None:
            rtol = self.default_rtol
        elif not _is_number(rtol) or not 0 <= rtol < math.inf:
            raise LorakitError(f"rtol={rtol!r} must be a share of the largest singular value, at least 0")
        return int((self._relative() > rtol).sum())

    @property
    def stable_rank(self) -> float:
        """See `lorakit.algebra.stable_rank`."""
        return float(self._relative().square().sum())

    @property
    def effective_rank(self) -> float:
        """See `lorakit.algebra.effective_rank`."""
        relative = self._relative()
        if relative[0] == 0:
            return 0.0
        return math.exp(float(torch.special.entr(relative / relative.sum()).sum()))

    @property
    def energy(self) -> Tensor:
        """See `lorakit.algebra.energy`."""
        kept = self._relative().square().cumsum(0)
        return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)

    def rank_for_energy(self, share: float) -> int:
        """See `lorakit.algebra.rank_for_energy`."""
        if not _is_number(share) or not 0 < share <= 1:
            raise LorakitError(f"share={share!r} must be above 0 and at most 1; 0.9 keeps 90 % of the energy")
        if self.values[0] == 0:
            return 0
        return int((self.energy < share).sum()) + 1

    def _relative(self) -> Tensor:
        """σᵢ/σ₁ in [0, 1], zeros for the zero matrix; float64 on the CPU, so squares and sums lose nothing."""
        values = self.values.cpu().double()
        return values / values[0] if values[0] > 0 else values


def numerical_rank(W: Tensor, rtol: float | None = None) -> int:
    """How many singular values of W: (d, k) are above rounding: above rtol·σ₁.

    Args:
        W: (d, k), real and floating-point.
        rtol: None is `Spectrum.default_rtol`: max(d, k)·ε for float32 and float64, as `numpy.linalg.matrix_rank` has
            it, and ε of W's own dtype for half precision.

    Returns:
        0 for the zero matrix, else 1 to min(d, k).

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers, or rtol is negative or not finite.
    """
    return Spectrum.of(W).numerical_rank(rtol)


def stable_rank(W: Tensor) -> float:
    """‖W‖_F²/‖W‖₂² of W: (d, k): the energy in units of the largest direction's.

    Never above the effective rank, and hardly changed by small singular values; 0.0 for the zero matrix.
    Source: Rudelson & Vershynin 2007, "Sampling from large matrices", arXiv:math/0503442 ("numerical rank" there).

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers.
    """
    return Spectrum.of(W).stable_rank


def effective_rank(W: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) of W: (d, k), where pᵢ = σᵢ/Σσ: how many equal directions would be as spread out.

    Between the stable rank and the rank; 0.0 for the zero matrix.
    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, eq. 4.

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers.
    """
    return Spectrum.of(W).effective_rank


def energy(W: Tensor) -> Tensor:
    """The share of ‖W‖_F² that the best approximations of W: (d, k) keep.

    Returns:
        (min(d, k),) float64 on the CPU: entry r−1 is for rank r. Never decreasing, the last is 1; all ones for the
        zero matrix, which loses nothing at any rank.

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers.
    """
    return Spectrum.of(W).energy


def rank_for_energy(W: Tensor, share: float) -> int:
    """The smallest rank at which the best approximation of W: (d, k) keeps `share` of ‖W‖_F².

    Args:
        W: (d, k), real and floating-point.
        share: above 0, at most 1. At 1, directions made of rounding count too: for the rank, see `numerical_rank`.

    Returns:
        0 for the zero matrix, else 1 to min(d, k).

    Raises:
        LorakitError: W is not a non-empty matrix of finite real numbers, or share is out of range.
    """
    return Spectrum.of(W).rank_for_energy(share)


def checked_matrix(W: Tensor, name: str = "W") -> Tensor:
    """W itself in the dtype to compute in, float64 if it is, else float32; `name` is what errors call it."""
    if not isinstance(W, Tensor):
        raise LorakitError(f"{name} is a {type(W).__name__}; give a torch.Tensor with two axes")
    if W.layout != torch.strided:
        raise LorakitError(f"{name} is sparse ({W.layout}); give {name}.to_dense()")
    if W.is_meta:
        raise LorakitError(f"{name} is on the meta device, where a tensor has a shape but no values; load it first")
    if W.ndim != 2:
        raise LorakitError(
            f"{name} has shape {tuple(W.shape)}, and a matrix has two axes; give one slice of it, or {name}.flatten(1)"
        )
    if not W.is_floating_point():
        raise LorakitError(f"{name} holds {W.dtype}; give real floating-point numbers")
    if W.numel() == 0:
        raise LorakitError(f"{name} has shape {tuple(W.shape)}: an empty matrix has no singular values")
    try:
        M = W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    except NotImplementedError as error:  # two 4-bit numbers packed in one byte
        raise LorakitError(f"{name} holds {W.dtype}, which torch cannot convert; unpack it to numbers first") from error
    if math.isfinite(torch.linalg.vector_norm(M)):  # one number, where `isfinite` needs as much memory as W again
        return M
    finite = torch.isfinite(M)
    if not finite.all():
        nan = int(torch.isnan(M).sum())
        infinite = int((~finite).sum()) - nan
        raise LorakitError(
            f"{name} of shape {tuple(W.shape)} holds {nan} NaN and {infinite} infinite numbers; "
            "it has no singular values, so look for where they came from"
        )
    return M


def check_overflow(values: Tensor, name: str) -> None:
    """The singular values of finite matrices can still pass the largest number of their dtype."""
    if not torch.isfinite(values).all():
        raise LorakitError(f"the norm of {name} is above the largest {values.dtype}; scale it down, or give float64")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
