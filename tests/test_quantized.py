"""The laws of the design over quantized and foreign linear layers, as far as their makers' code goes."""

import copy
import pickle
import re

import pytest
import torch
from helpers import anatomy, assert_close, attached, factors_of, randomize, run_everywhere
from quantized import (
    HIDDEN,
    IN,
    OUT,
    QUANTIZED,
    ROUNDING,
    assert_same_bits,
    bits,
    dense_of,
    over_quantized,
    over_readable,
    relative,
    typed_storage,
)
from torch import nn
from torch.nn import functional as F

import lorakit as lk


def part(case, seed=0):
    """One layer of the model, which nothing that trains lies below."""
    model, x = case.build(seed)
    return nn.Sequential(model[0]), x


@over_quantized
def test_attaching_and_disabling_change_no_bit_and_detaching_leaves_nothing(case):
    model, x = case.build()
    before, stored, base = anatomy(model), bits(model), run_everywhere(model, (x,))
    plan = lk.attach(model, lk.LoRA(rank=2))
    assert [row.layer for row in plan.rows] == ["0", "2"]
    assert_equal(run_everywhere(model, (x,)), base)
    randomize(model)
    for regime, y in run_everywhere(model, (x,)).items():
        assert not torch.equal(y, base[regime])
        assert y.dtype == base[regime].dtype
    assert_same_bits(bits(model), stored)
    with lk.disabled(model):
        assert_equal(run_everywhere(model, (x,)), base)
    lk.detach(model)
    assert anatomy(model) == before
    assert_same_bits(bits(model), stored)
    assert_equal(run_everywhere(model, (x,)), base)


def assert_equal(got, wanted):
    for regime, y in wanted.items():
        assert torch.equal(got[regime], y), regime


@over_quantized
def test_the_plan_takes_the_sizes_from_the_layer_and_says_how_it_is_stored(case):
    model, _ = case.build()
    plan = lk.plan(model, lk.LoRA(rank=2))
    first, second = plan.rows
    assert first.weight == (HIDDEN, IN)
    assert second.weight == (OUT, HIDDEN)
    assert first.tensors == {"A": (2, IN), "B": (HIDDEN, 2)}
    assert {row.applied for row in plan.rows} == {"beside"}
    for row in plan.rows:
        assert row.note == (f"frozen by quantization: {case.note}" if case.note else row.note)
        assert row.note
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert plan.base_parameters == HIDDEN * IN + OUT * HIDDEN + biases
    assert case.note in str(plan)


@over_quantized
def test_outputs_and_gradients_are_those_of_the_formula(case):
    layer, x = part(case)
    bare = copy.deepcopy(layer).requires_grad_(False)
    lk.attach(layer, lk.LoRA(rank=2, alpha=3))
    randomize(layer)
    ((A, B),) = factors_of(layer).values()
    assert A.dtype == B.dtype == torch.float32
    A.requires_grad_()
    B.requires_grad_()
    wanted = bare(x) + (1.5 * (x.float() @ A.T) @ B.T).to(x.dtype)
    got = layer(x)
    assert relative(got, wanted) < ROUNDING[case.dtype]
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    got.backward(cotangent)
    for mine, theirs in zip(lk.adapter_parameters(layer), (A, B), strict=True):
        assert relative(mine.grad, theirs.grad) < ROUNDING[case.dtype]


@over_readable
def test_they_are_those_of_the_dense_weight(case):
    layer, x = part(case)
    bias = layer[0].bias() if callable(layer[0].bias) else layer[0].bias
    W = dense_of(layer[0])
    assert W.shape == (HIDDEN, IN)
    assert W.is_floating_point() and not W.requires_grad
    limit = 0.05 if case.rounds_inputs else ROUNDING[case.dtype]
    assert relative(layer(x), F.linear(x, W.to(x.dtype), bias)) < limit
    attached(layer)
    assert torch.equal(dense_of(layer[0]), W)
    ((A, B),) = factors_of(layer).values()
    x, same_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = F.linear(same_x, (W + B @ A).to(x.dtype), bias)
    got = layer(x)
    assert relative(got, wanted) < limit
    if not case.differentiates:
        return
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    got.backward(cotangent)
    assert relative(x.grad, same_x.grad) < limit


@over_quantized
def test_only_the_adapter_trains_and_the_base_keeps_every_bit(case):
    model, x = (case.build if case.differentiates else lambda: part(case))()
    stored = bits(model)
    lk.attach(model, lk.LoRA(rank=4))
    mine = {id(p) for p in lk.adapter_parameters(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn(2, 3, model(x).shape[-1])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).float(), target)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (id(parameter) in mine) == (parameter.grad is not None), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert_same_bits(bits(model), stored)


@over_quantized
def test_a_part_of_a_gradient_is_refused(case):
    model, x = case.build()
    lk.attach(model, lk.LoRA(rank=2))
    y = model(x)
    if case.differentiates:
        y.sum().backward()
        return
    with pytest.raises(lk.LorakitError, match="sends no gradient to its input"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x), y)
    lk.detach(model)
    lk.attach(model, lk.LoRA(rank=2), targets="2")
    model(x).sum().backward()


@over_quantized
def test_save_then_load_on_a_fresh_copy_is_equal_to_the_bit(case, tmp_path):
    model, x = case.build()
    fresh, other = copy.deepcopy(model), case.build(seed=1)[0]
    plan = lk.attach(model, lk.LoRA(rank=2))
    randomize(model)
    for form in ("directory", "file.safetensors"):
        lk.save(model, tmp_path / form)
        loaded = lk.load(fresh, tmp_path / form)
        assert_equal(run_everywhere(fresh, (x,)), run_everywhere(model, (x,)))
        assert loaded.rows == plan.rows
        lk.detach(fresh)
    if case.name == "sealed":  # there is nothing to tell its bases by
        return
    with pytest.raises(lk.LorakitError) as caught:
        lk.load(other, tmp_path / "directory")
    assert re.findall(r"'([02].weight)' has other values", str(caught.value)) == ["0.weight", "2.weight"]
    lk.load(other, tmp_path / "directory", verify="off")


@over_readable
def test_an_adapter_moves_to_a_base_that_is_stored_otherwise_only_with_a_word(case, tmp_path):
    model, _ = case.build()
    dense = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False))
    lk.save(attached(model), tmp_path / "a")
    if case.note:
        with pytest.raises(lk.LorakitError, match=f"is float32 here and was {case.note} when saved"):
            lk.load(dense, tmp_path / "a")
    lk.load(dense, tmp_path / "a", verify="off")
    lk.save(dense, tmp_path / "b")
    with pytest.raises(lk.LorakitError):
        lk.load(case.build()[0], tmp_path / "b")


@over_quantized
def test_probe_sees_every_update(case):
    model, x = case.build()
    attached(model)
    stored, before = bits(model), anatomy(model)
    assert lk.probe(model, x).ok
    assert_same_bits(bits(model), stored)
    assert anatomy(model) == before


@typed_storage
@over_quantized
def test_switching_and_copying(case):
    model, x = case.build()
    attached(model, name="a", seed=1)
    ya = model(x)
    attached(model, name="b", seed=2)
    yb = model(x)
    with lk.active(model, "a"):
        assert torch.equal(model(x), ya)
    copies = [copy.deepcopy(model)]
    if case.pickles:
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert torch.equal(other(x), yb)
        lk.activate(other, "a")
        assert torch.equal(other(x), ya)
    assert torch.equal(model(x), yb)
    lk.remove(model, "b")
    lk.activate(model, "a")
    assert torch.equal(model(x), ya)


@typed_storage
@pytest.mark.parametrize("case", [case for case in QUANTIZED if case.loads], ids=lambda case: case.name)
def test_a_base_checkpoint_loads_strictly_and_leaves_the_adapter_alone(case):
    model, x = case.build()
    other, _ = case.build(seed=1)
    checkpoint = copy.deepcopy(other.state_dict())
    attached(model)
    attached(other)
    model.load_state_dict(checkpoint, strict=True)
    assert_equal(run_everywhere(model, (x,)), run_everywhere(other, (x,)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "case", [case for case in QUANTIZED if case.compiles and case.dtype == torch.float32], ids=lambda case: case.name
)
def test_it_compiles_in_one_graph(case):
    model, x = part(case)
    attached(model)
    with torch.no_grad():
        y = model(x)
        torch._dynamo.reset()
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)


@over_quantized
def test_in_the_weight_is_refused_with_the_reason(case):
    model, _ = case.build()
    before = anatomy(model)
    for how in ({"mode": "weight"}, {"targets": "2", "mode": "weight"}):
        with pytest.raises(lk.LorakitError, match="quantized" if case.note else "beside its call"):
            lk.attach(model, lk.LoRA(rank=2), **how)
    if case.note:
        with pytest.raises(lk.LorakitError):
            lk.attach(model, lk.LoRA(rank=2), targets="0.weight")
    assert anatomy(model) == before
