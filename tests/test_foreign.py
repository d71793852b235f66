"""Linear layers of other makes at the edges: what is one, what is not, and when."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import attached, randomize
from quantized import (
    IN,
    OUT,
    QUANTIZED,
    Packed,
    bnb,
    dense_of,
    each_linear,
    four_bits,
    relative,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk


def test_what_only_looks_like_a_linear_layer_is_not_one():
    class Mixer(nn.Module):
        def __init__(self, inside=None):
            super().__init__()
            self.in_features, self.out_features = 4, 5
            if inside is not None:
                self.inside = inside

        def forward(self, x):
            return x.sum(-1)

    plan = lk.plan(nn.Sequential(Mixer(nn.Sequential(nn.Linear(4, 5)))), lk.LoRA(rank=1))
    assert [row.layer for row in plan.rows] == ["0.inside.0"]
    model = nn.Sequential(Mixer())
    lk.attach(model, lk.LoRA(rank=1))
    with pytest.raises(lk.LorakitError, match="says it maps"):
        model(torch.randn(2, 4))
    wild = Mixer()
    wild.in_features = "four"
    with pytest.raises(lk.LorakitError, match="no linear layer"):
        lk.plan(nn.Sequential(wild, nn.BatchNorm1d(4)), lk.LoRA(rank=1))


def test_a_layer_is_adapted_before_it_is_quantized_or_has_values():
    for make, wanted in (
        (lambda: bnb.nn.Linear4bit(64, 64, quant_type="nf4"), "nf4"),
        (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), "int8"),
    ):
        with torch.device("meta"):
            plan = lk.plan(nn.Sequential(make()), lk.LoRA(rank=2))
        assert plan.rows[0].note.endswith(f"{wanted}, not quantized yet")
        model = nn.Sequential(make())
        plan = lk.attach(model, lk.LoRA(rank=2))
        assert plan.rows[0].note.endswith(f"{wanted}, not quantized yet")
        randomize(model)
        model.to("cpu")  # it is now
        assert lk.probe(model, torch.randn(2, 64)).ok
        assert lk.plan(model, lk.LoRA(rank=2), name="b").rows[0].note.endswith(wanted)


def test_what_is_quantized_and_no_linear_layer_is_refused_by_name():
    model = nn.Sequential(bnb.nn.Embedding4bit(64, 64, quant_type="nf4")).to("cpu")
    with pytest.raises(lk.LorakitError, match=r"'0\.weight'.*nf4"):
        lk.attach(model, lk.LoRA(rank=2), targets="0")


def test_lorakit_imports_none_of_their_libraries():
    code = """
import sys, torch, lorakit as lk
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
lk.attach(model, lk.LoRA(rank=2))
with lk.merged(model): model(torch.randn(2, 8))
print(sorted({"bitsandbytes", "torchao", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_layer_without_a_weight_can_say_it_itself():
    layer = Packed(nn.Linear(IN, OUT))
    assert torch.equal(dense_of(layer), layer.dequantize())


NF4 = next(case for case in QUANTIZED if case.name == "nf4")


def test_a_base_that_was_trained_one_step_further_is_told_apart(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT))
    further = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in further.parameters():
            parameter += 1e-3 * torch.randn_like(parameter).sign()  # a step of Adam
    make = each_linear(four_bits("nf4", True))
    lk.save(attached(make(plain)), tmp_path / "a")
    with pytest.raises(lk.LorakitError, match=r"'0\.weight' has other values(.|\n)*'2\.weight' has other values"):
        lk.load(make(further), tmp_path / "a")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_autocast_work_as_on_other_layers(reentrant):
    model, x = NF4.build()
    attached(model)
    x.requires_grad_()
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in lk.adapter_parameters(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, grad in zip(lk.adapter_parameters(model), wanted, strict=True):
        assert torch.equal(parameter.grad, grad)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), y) < 2e-2
