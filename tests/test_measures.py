"""Spectra, norms, subspaces, amplification and new directions: against torch's own decompositions of dense matrices."""

import copy

import pytest
import torch
from helpers import attached
from hypothesis import given, settings
from models import mlp
from torch import nn
from values import adapter, adapters, dense

import lorakit as lk
from lorakit.algebra import subspaces
from lorakit.values.measures import amplification, intruders, norm, overlap, spectrum

few = settings(max_examples=30, deadline=None)


@few
@given(adapters)
def test_spectra_and_norms_are_those_of_the_dense_update(a):
    norms = norm(a)
    for name, values in spectrum(a).items():
        wanted = torch.linalg.svdvals(dense(a)[name])
        assert torch.allclose(values, wanted[..., : values.shape[-1]], rtol=1e-6, atol=1e-6 * wanted.max())
        assert norms[name] ** 2 == pytest.approx(values.square().sum().item())
        assert norms[name] == pytest.approx(dense(a)[name].norm().item(), rel=1e-6)


@few
@given(adapters, adapters)
def test_overlap_is_symmetric_and_whole_with_itself(a, b):
    forth, back = overlap(a, b), overlap(b, a)
    assert {w.name for w in forth.weights} == {w.name for w in a.weights} & {w.name for w in b.weights}
    for one in forth.weights:
        (other,) = [w for w in back.weights if w.name == one.name]
        assert torch.allclose(one.phi_in, other.phi_in.mT, atol=1e-9)
        assert one.phi_out.min() >= 0 and one.phi_out.max() <= 1
    for of in ("update", "A", "B"):
        for one in overlap(a, a, of=of).weights:
            for phi in (one.phi_in, one.phi_out):
                r = phi.shape[-1]
                assert torch.allclose(phi.diagonal(dim1=-2, dim2=-1), torch.ones(r, dtype=phi.dtype), atol=1e-9)


def test_overlap_is_the_papers_formula():
    a, b = adapter(1, {"linear": 3}), adapter(2, {"linear": 2})
    (found,) = overlap(a, b).weights
    for phi, side in ((found.phi_out, 0), (found.phi_in, 2)):
        U, V = (torch.linalg.svd(dense(x)["linear.weight"]) for x in (a, b))
        U, V = (x[side] if side == 0 else x[side].mT for x in (U, V))
        for i in range(3):
            for j in range(2):
                wanted = (U[:, : i + 1].mT @ V[:, : j + 1]).norm() ** 2 / min(i + 1, j + 1)
                assert phi[i, j].item() == pytest.approx(wanted.item(), abs=1e-9)
    (of_a,) = overlap(a, b, of="A").weights
    right = [torch.linalg.svd(x.weights[0].tensors["A"].double(), full_matrices=False).Vh.mT for x in (a, b)]
    assert torch.allclose(of_a.phi_in, subspaces.similarity(*right), atol=1e-9)


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 7), (8, 8), (5, 20)])
def test_random_subspaces_share_the_larger_dimension_over_all(i, j):
    """E‖Uᵢᵀ·Uⱼ‖² = i·j/d, so that φ = max(i, j)/d in the mean."""
    d, generator = 40, torch.Generator().manual_seed(i + j)
    found = []
    for _ in range(300):
        U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q for n in (i, j))
        found.append(subspaces.similarity(U, V)[-1, -1].item())
    assert sum(found) / 300 == pytest.approx(max(i, j) / d, rel=0.15)


@few
@given(adapters)
def test_amplification_is_the_papers_formula(a):
    torch.manual_seed(0)
    base = {w.name: torch.randn(w.entry.shape, dtype=torch.float64) for w in a.weights}
    for found in amplification(a, base):
        delta, W = dense(a)[found.name], base[found.name]
        W = W.t() if found.name.startswith("words") else W if W.dim() == 3 else W.flatten(1)
        U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
        r = found.rank
        inner = U[..., :r].mT @ W @ Vh.mT[..., :r]
        assert found.change == pytest.approx(values[..., :r].norm().item(), rel=1e-6)
        assert found.before == pytest.approx(inner.norm().item(), rel=1e-5)
        assert found.factor == pytest.approx(found.change / found.before)


def test_a_live_model_is_a_base():
    base = mlp()
    plain = dict(copy.deepcopy(base).named_parameters())
    model = attached(base, targets=["0", "2"])
    value = lk.adapter_value(model)
    assert amplification(value, model) == amplification(value, plain)
    assert [found.name for found in intruders(value, model, k=3)] == ["0.weight", "2.weight"]


def test_a_large_new_direction_is_an_intruder_and_a_scaled_old_one_is_not():
    torch.manual_seed(0)
    W = torch.randn(40, 30, dtype=torch.float64)
    U, values, Vh = torch.linalg.svd(W)
    layer = nn.Linear(30, 40, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(W)
    model = nn.ModuleDict({"a": layer})

    def with_factors(B, A):
        fresh = nn.ModuleDict({"a": nn.Linear(30, 40, bias=False, dtype=torch.float64)})
        fresh["a"].weight.data.copy_(W)
        lk.attach(fresh, lk.LoRA(1))
        for parameter, value in zip(lk.adapter_parameters(fresh), (A, B), strict=True):
            parameter.data.copy_(value)
        return lk.adapter_value(fresh)

    old = with_factors(5 * U[:, :1] * values[0], Vh[:1])
    # A direction that is spread over all old ones is like none of them.
    new = with_factors(5 * values[0] * U.sum(1, keepdim=True) / 40**0.5, torch.randn(1, 30, dtype=torch.float64) / 5)
    assert intruders(old, model)[0].count == 0
    assert intruders(new, model)[0].count >= 1 and intruders(new, model)[0].similarities[0] < 0.6


def test_what_does_not_fit_the_base_is_all_named():
    a = adapter(1, {"linear": 2, "words": 1})
    with pytest.raises(lk.LorakitError) as caught:
        amplification(a, {"linear.weight": torch.zeros(7, 6)})
    assert "linear.weight" in str(caught.value) and "words.weight" in str(caught.value)
    for arguments in ({"k": 0}, {"k": True}, {"threshold": 2}, {"threshold": "x"}):
        with pytest.raises(lk.LorakitError):
            intruders(a, {}, **arguments)
    with pytest.raises(lk.LorakitError, match="of="):
        overlap(a, a, of="C")
    with pytest.raises(lk.LorakitError, match="rank"):
        amplification(a, {}, rank=0)


def test_reports_print():
    a = adapter(1, {"linear": 2, "experts": 1})
    assert "linear.weight" in str(overlap(a, a))
