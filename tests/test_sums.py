"""Merging in one pass: what is proven finite is, what is not is refused, and nothing is copied or formed in vain."""

import copy

import pytest
import torch
from helpers import assert_close, attach, attached, factors_of, randomize, refused, run_everywhere
from kinds import over_cases, over_dtypes
from models import mlp
from torch import nn

import lorakit as lk


@over_cases
@over_dtypes
def test_several_adapters_with_strengths_merge_as_they_act(case, dtype):
    model, inputs = case.build(dtype)
    for i, (name, variant) in enumerate({"a": lk.LoRA(rank=2), "b": lk.LoRA(rank=1, alpha=3), "c": lk.Full()}.items()):
        attach(model, case, variant, inputs, name=name)
        randomize(model, name, seed=i)
    for choice in ({"a": 0.7, "b": -0.3}, {"a": 0.5, "c": 0.4, "b": 1.0}):
        lk.activate(model, choice)
        y = run_everywhere(model, inputs)
        with lk.merged(model):
            for regime, merged in run_everywhere(model, inputs).items():
                assert_close(merged, y[regime], factor=2 * case.rounding)


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).to(dtype)


def set_factors(model: nn.Module, a: float, b: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(lk.adapter_parameters(model), (a, b), strict=True):
            parameter.fill_(value)


def test_where_the_norms_prove_nothing_each_number_is_looked_at():
    model = linear()
    lk.attach(model, lk.LoRA(rank=1))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    set_factors(model, 1e19, -2e19)  # 3e38 - 2e38: finite, though nothing but looking tells
    with lk.merged(model):
        assert torch.allclose(model[0].weight, torch.tensor(1e38), rtol=1e-6)
    set_factors(model, 1e19, 2e19)
    with refused(model, "0.weight", "NaN or infinity"):
        lk.merge(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["weight", "factor"])
@over_dtypes
def test_one_bad_number_anywhere_is_refused(bad, where, dtype):
    model = attached(mlp().to(dtype))
    with torch.no_grad():
        (model[2].weight if where == "weight" else lk.adapter_parameters(model)[2])[1, 1] = bad
    with refused(model, "2.weight", "NaN or infinity"):
        lk.merge(model)
    with refused(model, "2.weight", "NaN or infinity"), lk.merged(model):
        pass


def test_what_overflows_only_when_it_is_rounded_is_refused():
    model = linear(torch.float16)
    lk.attach(model, lk.LoRA(rank=1))
    set_factors(model, 300.0, 200.0)  # 60,000: fits
    with lk.merged(model):
        assert model[0].weight.isfinite().all()
    set_factors(model, 300.0, 300.0)  # 90,000: does not
    with refused(model, "0.weight"):
        lk.merge(model)


@over_dtypes
def test_merging_for_good_writes_into_the_weight_and_says_what_it_did(dtype):
    model = attached(linear(dtype))
    weight, W = model[0].weight, model[0].weight.detach().double().clone()
    where, ((A, B),) = weight.data_ptr(), factors_of(model).values()
    delta = B.double() @ A.double()
    row = lk.merge(model).weights[0]
    assert model[0].weight is weight and weight.data_ptr() == where
    assert row.change == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
    rounding = float((weight.detach().double() - (W + delta)).norm() / delta.norm())
    assert row.lost == pytest.approx(rounding, abs=1e-6)


def test_the_report_holds_when_two_adapters_nearly_cancel():
    model = attached(linear(), name="a")
    lk.attach(model, lk.LoRA(rank=2), name="b")
    with torch.no_grad():
        for mine, other in zip(lk.adapter_parameters(model, "b"), lk.adapter_parameters(model, "a"), strict=True):
            mine.copy_(other)
    (A, B) = factors_of(model, "a")["0.weight"]
    W = model[0].weight.detach()
    row = lk.merge(model, {"a": 1.0, "b": -0.999}).weights[0]
    assert row.change == pytest.approx(0.001 * float((B @ A).norm() / W.norm()), rel=1e-2)


def test_an_embedding_of_which_a_row_must_stay_keeps_it_to_the_bit():
    model = nn.Sequential(nn.Embedding(7, 6, padding_idx=2))
    row = model[0].weight.detach()[2].clone()
    attached(model, targets="0")
    plain = copy.deepcopy(model)
    with lk.merged(model):
        assert torch.equal(model[0].weight[2], row)
        assert not torch.equal(model[0].weight[3], plain[0].weight[3])
