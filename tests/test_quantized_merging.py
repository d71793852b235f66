"""Merging into quantized layers: quantized again and what that costs, put aside to the bit, or made plain."""

import pytest
import torch
from helpers import anatomy, attached, factors_of, randomize
from quantized import (
    IN,
    QUANTIZED,
    ROUNDING,
    assert_same_bits,
    bits,
    bnb,
    dense_of,
    over_quantized,
    relative,
)
from torch import nn

import lorakit as lk


@pytest.mark.parametrize("case", [case for case in QUANTIZED if case.requantizes], ids=lambda case: case.name)
def test_merging_quantizes_again_and_says_what_it_cost(case):
    model, x = case.build()
    attached(model)
    y, stored, before = model(x), bits(model), anatomy(model)
    weights = [model[i].weight for i in (0, 2)]
    with lk.merged(model):
        inside = model(x)
        assert not any("lora" in name for name, _ in model.named_modules())
    assert [model[i].weight is weight for i, weight in zip((0, 2), weights, strict=True)] == [True, True]
    assert torch.equal(model(x), y)
    assert_same_bits(bits(model), stored)
    assert without_hooks(anatomy(model)) == without_hooks(before)
    W, ((A, B), _) = dense_of(model[0]), factors_of(model).values()
    report = lk.merge(model)
    merged = dense_of(model[0])
    assert report.weights[0].lost == pytest.approx(relative(merged - W, B @ A), rel=1e-3)
    assert 0 < report.weights[0].lost < 0.5
    assert torch.equal(model(x), inside)
    assert relative(inside, y) < 0.3
    assert lk.adapters(model) == {}
    assert [type(m) for m in model.modules()] == [type(m) for m in case.build()[0].modules()]


def without_hooks(seen):
    """Torch counts hooks up: one that was taken off and put back has another number."""
    return {
        path: (cls, {key: [] if key.startswith("_forward_hooks") else value for key, value in own.items()})
        for path, (cls, own) in seen.items()
    }


@pytest.mark.parametrize("case", [case for case in QUANTIZED if case.requantizes], ids=lambda case: case.name)
def test_a_small_update_is_lost_in_the_grid_and_merging_says_so(case):
    model, _ = case.build()
    attached(model)
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter *= 0.01
    with pytest.warns(UserWarning, match="dequantize=True"):
        report = lk.merge(model)
    assert report.weights[0].lost > 0.5


@pytest.mark.parametrize(
    "case", [c for c in QUANTIZED if not c.requantizes and c.name != "packed"], ids=lambda case: case.name
)
def test_where_the_scheme_is_not_known_merging_is_refused(case):
    model, x = case.build()
    attached(model)
    y, before = model(x), anatomy(model)
    with pytest.raises(lk.LorakitError, match=r"'0\.weight'.*dequantize=True"):
        lk.merge(model)
    with pytest.raises(lk.LorakitError, match=r"'0\.weight'"), lk.merged(model):
        pass
    assert anatomy(model) == before
    assert torch.equal(model(x), y)


@over_quantized
def test_merging_into_plain_layers_keeps_the_output(case):
    model, x = case.build()
    attached(model)
    y, before = model(x), anatomy(model)
    if not case.becomes_plain:
        with pytest.raises(lk.LorakitError, match=r"'0\.weight'"):
            lk.merge(model, dequantize=True)
        assert anatomy(model) == before
        return
    report = lk.merge(model, dequantize=True)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert relative(model(x), y) < (0.05 if case.rounds_inputs else ROUNDING[case.dtype])
    assert all(row.lost < 1e-2 for row in report.weights)
    assert lk.adapters(model) == {}
    model, x = case.build()
    attached(model)
    lk.merge(model, dequantize=torch.float64)
    assert model.double()(x.double()).dtype == torch.float64


def test_a_merge_that_is_not_finite_or_has_no_place_is_refused():
    (case,) = [case for case in QUANTIZED if case.name == "nf4"]
    model, _ = case.build()
    attached(model[0])
    with pytest.raises(lk.LorakitError, match=r"nn\.Sequential"):
        lk.merge(model[0], dequantize=True)
    lk.detach(model[0])
    attached(model)
    with torch.no_grad():
        lk.adapter_parameters(model)[0][0, 0] = torch.inf
    with pytest.raises(lk.LorakitError, match="NaN or infinity"):
        lk.merge(model)


def test_a_layer_that_quantizes_at_each_call_becomes_plain_when_merged():
    model, x = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)), torch.randn(2, 64)
    attached(model)
    y = model(x)
    with pytest.raises(lk.LorakitError, match="dequantize=True"):
        lk.merge(model)
    lk.merge(model, dequantize=True)
    assert type(model[0]) is nn.Linear
    assert relative(model(x), y) < 0.05


def test_a_shared_layer_is_replaced_in_every_place():
    (case,) = [case for case in QUANTIZED if case.name == "nf4"]
    layer = case.build()[0][0]
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, IN)
    assert lk.attach(model, lk.LoRA(rank=2)).rows[0].note.startswith("also 2; frozen")
    randomize(model)
    y = model(x)
    lk.merge(model, dequantize=True)
    assert model[0] is model[2]
    assert relative(model(x), y) < 1e-5
