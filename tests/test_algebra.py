"""The laws of ranks and decompositions, over random shapes, ranks and scales."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.algebra import (
    Spectrum,
    decompose,
    effective_rank,
    energy,
    factored_singular_values,
    numerical_rank,
    rank_for_energy,
    stable_rank,
)
from lorakit.errors import LorakitError

READINGS = {
    "numerical_rank": numerical_rank,
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "energy": energy,
    "rank_for_energy": lambda W: rank_for_energy(W, 0.9),
    "decompose": lambda W: decompose(W, 1),
    "factored_singular_values": lambda W: factored_singular_values(W, torch.eye(3)),
}
DTYPES = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, n: int, r: int) -> Tensor:
    return torch.linalg.qr(normal(seed, n, r)).Q


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A d×k matrix whose r singular values that are not zero lie within a factor of ten, and r."""
    d, k = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    r = draw(st.integers(1, min(d, k)))
    seed, size = draw(st.integers(0, 10_000)), 10.0 ** draw(st.integers(-15, 15))
    values = size * torch.logspace(0, -1, r, dtype=torch.float64)
    W = orthonormal(seed, d, r) * values @ orthonormal(seed + 1, k, r).T
    return W.to(draw(st.sampled_from(DTYPES))), r


laws = settings(max_examples=25, deadline=None)


@given(matrices())
@laws
def test_the_numerical_rank_is_the_rank_and_agrees_with_numpy(case: tuple[Tensor, int]) -> None:
    W, r = case
    assert numerical_rank(W) == r == np.linalg.matrix_rank(W.numpy())


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 10_000))
@laws
def test_a_product_of_random_factors_has_their_inner_dimension_as_rank(d: int, k: int, r: int, seed: int) -> None:
    assert numerical_rank(normal(seed, d, r) @ normal(seed + 1, r, k)) == min(d, k, r)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (40, 30), (300, 200), (1000, 16)], ids=str)
def test_rounding_to_half_precision_adds_no_rank_and_takes_none(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    d, k = shape
    r = 3
    W = orthonormal(0, d, r) @ orthonormal(1, k, r).T
    assert numerical_rank(W.to(dtype)) == r
    assert numerical_rank(torch.eye(d, k).to(dtype)) == min(d, k)  # also where max(d, k)·ε is above 1


@given(matrices())
@laws
def test_stable_rank_effective_rank_and_rank_are_in_this_order(case: tuple[Tensor, int]) -> None:
    # Σ(σ/σ₁)² ≤ Σσ/σ₁ = exp(H∞) ≤ exp(H₁) ≤ the number of singular values that are not zero.
    W, r = case
    rounding = 1e-4
    assert 1 - rounding <= stable_rank(W) <= effective_rank(W) * (1 + rounding) <= r * (1 + rounding) ** 2


@given(matrices(), st.floats(0.01, 1.0))
@laws
def test_energy_never_decreases_ends_in_one_and_gives_the_rank_for_a_share(
    case: tuple[Tensor, int], share: float
) -> None:
    W, r = case
    kept = energy(W)
    assert kept.shape == (min(W.shape),)
    assert (kept.diff() >= 0).all() and kept[-1] == 1
    assert kept[r - 1] == pytest.approx(1)
    enough = rank_for_energy(W, share)
    assert kept[enough - 1] >= share
    assert enough == 1 or kept[enough - 2] < share


@given(matrices(), st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
@laws
def test_transposing_and_scaling_change_nothing(case: tuple[Tensor, int], factor: float) -> None:
    W, _ = case
    for other in (W.T, W * factor, -W):
        assert numerical_rank(other) == numerical_rank(W)
        assert stable_rank(other) == pytest.approx(stable_rank(W), rel=1e-4)
        assert effective_rank(other) == pytest.approx(effective_rank(W), rel=1e-4)
        torch.testing.assert_close(energy(other), energy(W), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 20))
def test_n_equal_directions_count_as_n(n: int) -> None:
    W = 7 * torch.eye(20, 30)[:n]
    assert numerical_rank(W) == n
    assert stable_rank(W) == pytest.approx(n)
    assert effective_rank(W) == pytest.approx(n)
    assert rank_for_energy(W, 1) == n


def test_one_spectrum_gives_every_reading() -> None:
    W = normal(0, 12, 7).bfloat16()
    spectrum = Spectrum.of(W)
    assert spectrum.shape == (12, 7) and spectrum.dtype == torch.bfloat16 and spectrum.values.dtype == torch.float32
    assert spectrum.numerical_rank() == numerical_rank(W)
    assert (
        spectrum.numerical_rank(0.3)
        == numerical_rank(W, 0.3)
        == int((spectrum.values > 0.3 * spectrum.values[0]).sum())
    )
    assert spectrum.stable_rank == stable_rank(W)
    assert spectrum.effective_rank == effective_rank(W)
    assert spectrum.rank_for_energy(0.5) == rank_for_energy(W, 0.5)
    assert torch.equal(spectrum.energy, energy(W))


def test_the_zero_matrix_has_no_rank_and_loses_nothing() -> None:
    W = torch.zeros(4, 6)
    assert numerical_rank(W) == rank_for_energy(W, 1.0) == 0
    assert stable_rank(W) == effective_rank(W) == 0.0
    assert energy(W).tolist() == [1] * 4
    B, A, error, values = decompose(W, 2)
    assert error == 0 and not (B @ A).any() and not values.any()


@given(matrices(), st.data())
@laws
def test_a_decomposition_is_the_best_of_its_rank(case: tuple[Tensor, int], data: st.DataObject) -> None:
    W, r = case
    rank = data.draw(st.integers(1, min(W.shape)))
    B, A, error, values = decompose(W, rank)
    size = float(torch.linalg.norm(W))
    rounding = size * 50 * torch.finfo(W.dtype).eps
    assert (B.shape, A.shape, values.shape) == ((W.shape[0], rank), (rank, W.shape[1]), (min(W.shape),))
    assert B.dtype == A.dtype == values.dtype == W.dtype
    # Eckart and Young: the error is what the discarded singular values hold …
    assert float(torch.linalg.norm(W - B @ A)) == pytest.approx(error, abs=rounding)
    assert math.hypot(*torch.linalg.svdvals(W)[rank:].tolist()) == pytest.approx(error, abs=rounding)
    assert error**2 == pytest.approx(size**2 * (1 - float(energy(W)[rank - 1])), abs=rounding * size)
    assert rank < r or error <= rounding
    # … and neither another matrix of this rank nor a neighbour of B·A is nearer.
    unit = {"dtype": W.dtype, "generator": torch.Generator().manual_seed(rank)}
    for B2, A2 in [
        (torch.randn(B.shape, **unit), torch.randn(A.shape, **unit) * size),
        (B * (1 + 0.1 * torch.randn(B.shape, **unit)), A),
        (B, A + A.abs().max() * 0.1 * torch.randn(A.shape, **unit)),
    ]:
        assert float(torch.linalg.norm(W - B2 @ A2)) >= error - rounding


@given(matrices())
@laws
def test_both_factors_carry_the_same_share_of_each_singular_value(case: tuple[Tensor, int]) -> None:
    W, r = case
    B, A, _, values = decompose(W, r)
    close = {"rtol": 1e-3, "atol": float(values[0]) * 1e-5}
    torch.testing.assert_close(B.T @ B, torch.diag(values[:r]), **close)
    torch.testing.assert_close(A @ A.T, torch.diag(values[:r]), **close)


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 24),
    st.integers(0, 10_000),
    st.sampled_from([1.0, -0.5, 0, 8]),
)
@laws
def test_factored_singular_values_are_those_of_the_product(d: int, k: int, r: int, seed: int, scale: float) -> None:
    B, A = normal(seed, d, r), normal(seed + 1, r, k)
    expected = torch.linalg.svdvals(scale * B @ A)[: min(d, k, r)]
    for dtype in (*DTYPES, *HALVES):
        values = factored_singular_values(B.to(dtype), A.to(dtype), scale)
        assert values.shape == (min(d, k, r),) and (values.diff() <= 0).all()
        tolerance = float(torch.linalg.norm(B) * torch.linalg.norm(A)) * abs(scale) * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=tolerance)


def test_factored_singular_values_do_not_form_the_product() -> None:
    B, A = torch.ones(1_000_000, 1), torch.ones(1, 1_000_000)  # B·A would take 4 TB
    assert factored_singular_values(B, A).item() == pytest.approx(1e6)


def test_autocast_costs_no_precision() -> None:
    B, A = normal(0, 20, 4).float(), normal(1, 4, 20).float()
    expected = factored_singular_values(B, A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factored_singular_values(B, A), expected)


def test_no_gradient_flows_and_nothing_is_changed() -> None:
    W = normal(0, 5, 4).requires_grad_()
    before = W.detach().clone()
    B, A, _, values = decompose(W, 2)
    assert not any(t.requires_grad for t in (B, A, values, energy(W), factored_singular_values(W, W.T)))
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn], ids=str)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    W = normal(0, 8, 5).to(dtype)
    assert torch.equal(Spectrum.of(W).values, torch.linalg.svdvals(W.float()))
    assert decompose(W, 3).B.dtype == torch.float32


def holding(value: float) -> Tensor:
    W = torch.ones(4, 3)
    W[1, 2] = value
    return W


BAD = {
    "NaN": (holding(math.nan), "holds 1 NaN and 0 infinite"),
    "infinity": (holding(-math.inf), "holds 0 NaN and 1 infinite"),
    "half NaN": (holding(math.nan).half(), "1 NaN"),
    "vector": (torch.ones(3), r"shape \(3,\)"),
    "scalar": (torch.tensor(1.0), r"shape \(\)"),
    "3-D": (torch.ones(2, 3, 4), r"flatten\(1\)"),
    "empty": (torch.ones(0, 3), "empty"),
    "integer": (torch.ones(3, 3, dtype=torch.long), "int64"),
    "bool": (torch.ones(3, 3, dtype=torch.bool), "bool"),
    "complex": (torch.ones(3, 3, dtype=torch.complex64), "complex64"),
    "meta": (torch.ones(3, 3, device="meta"), "meta device"),
    "sparse": (torch.eye(3).to_sparse(), "to_dense"),
    "a number": (3, "is a int"),
    "an array": (np.ones((3, 3)), "is a ndarray"),
    "too large": (torch.full((3, 3), 3e38), "float64"),
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_finite_real_matrix_is_refused_by_name(reading: str, bad: str) -> None:
    W, message = BAD[bad]
    with pytest.raises(LorakitError, match=message):
        READINGS[reading](W)


@pytest.mark.parametrize("rank", [0, -1, 4, 2.0, True, None, "2"])
def test_a_rank_out_of_range_is_refused(rank: object) -> None:
    with pytest.raises(LorakitError, match="from 1 to 3"):
        decompose(torch.ones(3, 5), rank)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, True, "0.9", None])
def test_a_share_out_of_range_is_refused(share: object) -> None:
    with pytest.raises(LorakitError, match="share="):
        rank_for_energy(torch.ones(3, 3), share)


@pytest.mark.parametrize("rtol", [-1e-9, math.nan, math.inf, True, "0"])
def test_a_tolerance_out_of_range_is_refused(rtol: object) -> None:
    with pytest.raises(LorakitError, match="rtol="):
        numerical_rank(torch.ones(3, 3), rtol)


@pytest.mark.parametrize("scale", [math.nan, math.inf, True, "1"])
def test_a_scale_that_is_no_number_is_refused(scale: object) -> None:
    with pytest.raises(LorakitError, match="scale="):
        factored_singular_values(torch.ones(3, 1), torch.ones(1, 3), scale)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LorakitError, match=r"B: \(3, 2\).*A: \(3, 4\)"):
        factored_singular_values(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(LorakitError, match=r"A of shape .* holds 12 NaN"):
        factored_singular_values(torch.ones(4, 3), torch.full((3, 4), math.nan))
