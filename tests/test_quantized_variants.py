"""Every variant on quantized layers: there it is what it is on a plain layer of the dequantized weight."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import anatomy, attach, randomize, run_everywhere
from kinds import VARIANTS
from quantized import (
    HIDDEN,
    IN,
    OUT,
    QUANTIZED,
    ROUNDING,
    UNREAD,
    assert_same_bits,
    bits,
    dense_of,
    each_linear,
    four_bits,
    over_readable,
    relative,
)
from torch import nn

import lorakit as lk

GRADIENTS = VARIANTS["lora-ga"]


@dataclass(frozen=True)
class How:
    """The arguments of `attach` that the shared helper asks a case for."""

    how: dict[str, Any] = field(default_factory=lambda: {"targets": "all-linear"})


over_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def refused_there(variant, model, x) -> bool:
    """The gradient of a quantized weight is none: that start is refused, and nothing has changed."""
    if variant is not GRADIENTS:
        return False
    before = anatomy(model)
    with pytest.raises(lk.LorakitError, match="gradient of the weight"):
        attach(model, How(), variant, (x,))
    assert anatomy(model) == before
    return True


@over_variants
@over_readable
def test_attaching_changes_no_bit_and_detaching_leaves_nothing(case, variant):
    model, x = case.build()
    before, stored, base = anatomy(model), bits(model), run_everywhere(model, (x,))
    if refused_there(variant, model, x):
        return
    attach(model, How(), variant, (x,))
    for regime, y in run_everywhere(model, (x,)).items():
        assert torch.equal(y, base[regime])
    randomize(model)
    assert_same_bits(bits(model), stored)
    with lk.disabled(model):
        for regime, y in run_everywhere(model, (x,)).items():
            assert torch.equal(y, base[regime])
    assert lk.probe(model, x).ok
    lk.detach(model)
    assert anatomy(model) == before
    assert_same_bits(bits(model), stored)


@over_variants
@over_readable
def test_it_is_what_it_is_on_the_dequantized_weight(case, variant, tmp_path):
    model, x = case.build()
    if variant is GRADIENTS:
        return
    plain = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False))
    bias = model[0].bias() if callable(model[0].bias) else model[0].bias
    with torch.no_grad():
        plain[0].bias.copy_(bias)
        for i in (0, 2):
            plain[i].weight.copy_(dense_of(model[i]))
    fresh = copy.deepcopy(model)
    attach(model, How(), variant, (x,))
    randomize(model)
    lk.save(model, tmp_path / "a")
    lk.load(fresh, tmp_path / "a")
    for regime, y in run_everywhere(model, (x,)).items():
        assert torch.equal(run_everywhere(fresh, (x,))[regime], y)
    lk.load(plain.to(case.dtype), tmp_path / "a", verify="off")
    assert relative(model(x), plain(x)) < (0.05 if case.rounds_inputs else 3 * ROUNDING[case.dtype])
    report = lk.merge(model, dequantize=True)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert relative(model(x), plain(x)) < 3 * ROUNDING[case.dtype]
    assert all(row.lost < 3e-2 for row in report.weights)


@pytest.mark.parametrize("case", UNREAD, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["dora", "pissa", "olora"])
def test_what_needs_the_weight_is_refused_where_it_cannot_be_read(case, name):
    model, _ = case.build()
    before = anatomy(model)
    for verb in (lk.plan, lk.attach):
        with pytest.raises(lk.LorakitError, match="at '0'"):
            verb(model, VARIANTS[name])
    assert anatomy(model) == before


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_loftq_begins_nearer_to_the_weights_before_quantization(quant_type):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False))
    model = each_linear(four_bits(quant_type, True))(copy.deepcopy(original))
    x = torch.randn(2, 3, IN)
    wanted, before = original(x), relative(model(x), original(x))
    lk.attach(model, lk.LoRA(rank=32, init="loftq"), original=original)
    assert relative(model(x), wanted) < 0.85 * before
    for i in (0, 2):
        error = original[i].weight.detach() - dense_of(model[i])
        left = (
            error
            - lk.adapter_state_dict(model)[f"base_model.model.{i}.lora_B.weight"]
            @ (lk.adapter_state_dict(model)[f"base_model.model.{i}.lora_A.weight"])
        )
        best = torch.linalg.svdvals(error)[32:].norm()
        assert left.norm().item() == pytest.approx(best.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "vera"])
def test_a_part_of_a_gradient_is_refused_whatever_is_trained(name):
    (case,) = [case for case in QUANTIZED if case.name == "torchao-int8-dynamic"]
    model, x = case.build()
    lk.attach(model, VARIANTS[name])
    with pytest.raises(lk.LorakitError, match="sends no gradient to its input"):
        model(x).sum().backward()
