"""What is in an adapter, and how two of them differ: against the dense ΔW."""

import json

import pytest
import torch
from helpers import attached
from kinds import over_dtypes
from torch import nn

import lorakit as lk
from lorakit.values.comparison import compare
from lorakit.values.inspection import inspect


def model(dtype=torch.float32):
    torch.manual_seed(0)
    parts = {
        "a": nn.Linear(6, 8),
        "words": nn.Embedding(9, 5),
        "conv": nn.Conv1d(3, 4, 2),
        "attn": nn.MultiheadAttention(4, 2),
    }
    return nn.ModuleDict(parts).to(dtype)


TARGETS = ["a", "words", "conv", "attn.in_proj_weight", "attn.q_proj_weight"]


def value(seed=1, variant=None, dtype=torch.float32, targets=("a", "words", "conv", "attn.q_proj_weight")):
    return lk.adapter_value(attached(model(dtype), variant or lk.LoRA(2, alpha=3), targets=list(targets), seed=seed))


def deltas(adapter):
    return {weight.name: B.double() @ A.double() for weight in adapter.weights for B, A in [weight.product()]}


@over_dtypes
def test_norms_and_spectra_are_those_of_the_dense_update(dtype):
    adapter = value(dtype=dtype)
    found = {weight.name: weight for weight in inspect(adapter).weights}
    for name, dense in deltas(adapter).items():
        sigma = torch.linalg.svdvals(dense).square().reshape(-1, min(dense.shape[-2:])).sum(0).sqrt()
        assert found[name].norm == pytest.approx(dense.norm().item(), rel=1e-9)
        assert found[name].spectrum == pytest.approx(sigma[: len(found[name].spectrum)].tolist(), rel=1e-6, abs=1e-12)
        kept = sigma.square().cumsum(0) / sigma.square().sum()
        assert found[name].rank_for_energy(0.9) == int((kept < 0.9).sum()) + 1
        assert found[name].state == "" and found[name].rank == 2 and found[name].alpha == 3


def test_what_is_dead_or_broken_is_named():
    base = attached(model(), targets=["a", "words", "conv"])
    a, words, _ = (lk.adapter_parameters(base)[i : i + 2] for i in (0, 2, 4))
    with torch.no_grad():
        a[1].zero_()
        words[0][0, 0] = torch.inf
    found = inspect(lk.adapter_value(base))
    assert found.dead == ("a.weight",) and found.broken == ("words.weight",)
    assert found.rank_for_energy(0.99) == 2
    json.dumps(found.to_json())


@pytest.mark.parametrize("variant", [lk.DoRA(2), lk.LoHa(2), lk.LoKr(1), lk.AdaLoRA(2)], ids=lambda v: type(v).__name__)
def test_other_methods_are_looked_at_too(variant):
    adapter = value(variant=variant, targets=["a"])
    found = inspect(adapter)
    assert found.numbers == adapter.parameters
    assert (found.weights[0].spectrum is not None) == isinstance(variant, lk.AdaLoRA)
    json.dumps(found.to_json())


def test_an_adapter_is_the_same_as_itself_and_as_its_copies(tmp_path):
    a = value()
    lk.write(a, tmp_path / "a.safetensors")
    for other in (a, lk.read(tmp_path / "a.safetensors")):
        found = compare(a, other)
        assert found.same and found.distance == 0 and not any(found.only)
        assert all(weight.cosine == pytest.approx(1) for weight in found.weights)


def test_two_adapters_are_compared_as_dense_updates_are():
    a, b = value(seed=1), value(seed=2)
    found = compare(a, b)
    assert not found.same
    for weight in found.weights:
        x, y = deltas(a)[weight.name], deltas(b)[weight.name]
        assert weight.norms == pytest.approx((x.norm().item(), y.norm().item()), rel=1e-9)
        assert weight.distance == pytest.approx((x - y).norm().item() / max(weight.norms), rel=1e-9)
        assert weight.cosine == pytest.approx((x * y).sum().item() / (weight.norms[0] * weight.norms[1]), abs=1e-9)


def test_what_cannot_be_compared_is_said():
    a = value(targets=["a", "words"])
    b = value(targets=["conv", "words"], variant=lk.LoRA(1))
    found = compare(a, b)
    assert found.only == (("a.weight",), ("conv.weight",)) and not found.same
    found = compare(a, value(targets=["a"], variant=lk.DoRA(2)))
    assert "DoRA" in found.unlike[0] and not found.weights and found.distance == 0 and not found.same
