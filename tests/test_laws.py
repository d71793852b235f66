"""Laws 1–5 and 7 of the design, each over every kind of layer and every variant."""

import copy

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    attached,
    clones,
    dense_lora,
    factor_key,
    factors_of,
    picture,
    randomize,
    run,
    run_everywhere,
    scale_of,
    storage,
)
from kinds import CASES, Case, over_cases, over_dtypes, over_variants

import lorakit as lk


def assert_as_bare(case: Case, got, *bare) -> None:
    """To the bit what the bare model gives; torch's attention takes another kernel where less is trainable."""
    for regime, y in got.items():
        if case.leaves_fused_path and regime == "inference":
            assert_close(y, bare[0][regime])
        else:
            assert any(torch.equal(y, outputs[regime]) for outputs in bare), regime


@over_dtypes
@over_variants
@over_cases
def test_attaching_and_disabling_change_no_bit_and_detaching_leaves_nothing(case, variant, dtype):
    model, inputs = case.build(dtype)
    before, base = picture(model), run_everywhere(model, inputs)
    bare = copy.deepcopy(model).requires_grad_(False)
    frozen = run_everywhere(bare, inputs)
    lk.attach(model, variant, **case.how)
    for weight in lk.adapters(model)["default"].weights:
        bare.get_parameter(weight).requires_grad_()
    partly = run_everywhere(bare, inputs)
    assert_as_bare(case, run_everywhere(model, inputs), base, frozen, partly)
    randomize(model)
    for regime, y in run_everywhere(model, inputs).items():
        assert not torch.equal(y, base[regime])
    with lk.disabled(model):
        assert_as_bare(case, run_everywhere(model, inputs), base, frozen)
    lk.detach(model)
    assert_same(picture(model), before)
    assert_bits(run_everywhere(model, inputs), base)


@over_cases
def test_modes_and_requires_grad_come_back_as_they_were(case):
    model, inputs = case.build()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = picture(model)
    attached(model, **case.how)
    attached(model, **case.how, name="second")
    run(model, inputs)
    lk.detach(model)
    assert_same(picture(model), before)


@over_variants
@over_cases
def test_the_base_keeps_its_keys_values_storage_and_class(case, variant):
    model, _ = case.build()
    base, places = clones(model.state_dict()), storage(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    plan = lk.attach(model, variant, **case.how)
    randomize(model)
    state = model.state_dict()
    kept = {key: value for key, value in state.items() if key in base}
    assert_bits(kept, base)
    assert storage(kept) == places
    weights = lk.adapters(model)["default"].weights
    assert set(state) - set(base) >= {factor_key(weight, "default", tensor) for weight in weights for tensor in "AB"}
    for name, cls in classes.items():
        now = type(model.get_submodule(name))
        assert issubclass(now, cls)
        assert now is cls or any(row.applied == "in the weight" for row in plan.rows)


@over_cases
def test_a_base_checkpoint_loads_strictly_and_leaves_the_adapter_alone(case):
    model, inputs = case.build()
    other, _ = case.build(seed=5)
    attached(model, **case.how)
    factors = factors_of(model)
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(other).state_dict(), strict=True, assign=assign)
        for weight, (A, B) in factors_of(model).items():
            assert torch.equal(A, factors[weight][0])
            assert torch.equal(B, factors[weight][1])
        wanted = run(dense_lora(other, factors, 1.0), inputs)
        assert_close(run(model, inputs), wanted)


@over_cases
def test_a_checkpoint_with_the_adapter_loads_strictly_and_brings_it_back(case):
    model, inputs = case.build()
    attached(model, **case.how)
    y, checkpoint = run(model, inputs), clones(model.state_dict())
    randomize(model, seed=9)
    assert not torch.equal(run(model, inputs), y)
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(run(model, inputs), y)
    key = next(key for key in checkpoint if key.endswith(".A"))
    del checkpoint[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint, strict=True)


@over_variants
@over_cases
def test_outputs_and_gradients_are_those_of_the_dense_formula(case, variant):
    model, inputs = case.build(torch.float64)
    plain = copy.deepcopy(model)
    lk.attach(model, variant, **case.how)
    randomize(model)
    factors = {w: (A.requires_grad_(), B.requires_grad_()) for w, (A, B) in factors_of(model).items()}
    leaves = [tensor for pair in factors.values() for tensor in pair]
    x, same_x = (tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs) for _ in range(2))
    wanted = run(dense_lora(plain, factors, scale_of(variant)), same_x)
    got = run(model, x)
    assert_close(got, wanted)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    got.backward(cotangent)
    parameters = dict(model.named_parameters())
    mine = [parameters[factor_key(weight, "default", tensor)] for weight in factors for tensor in "AB"]
    for parameter, leaf in zip(mine, leaves, strict=True):
        assert_close(parameter.grad, leaf.grad)
    for a, b in zip(x, same_x, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_close(a.grad, b.grad)


@over_dtypes
@over_variants
@pytest.mark.parametrize("case", [c for c in CASES if c.mode != "weight"], ids=lambda case: case.name)
def test_beside_and_in_the_weight_agree(case, variant, dtype):
    model, inputs = case.build(dtype)
    other = copy.deepcopy(model)
    lk.attach(model, variant, **case.how)
    plan = lk.attach(other, variant, targets=case.targets, mode="weight")
    assert {row.applied for row in plan.rows} == {"in the weight"}
    for each in (model, other):
        randomize(each)
    y, other_y = run(model, inputs), run(other, inputs)
    assert_close(y, other_y)
    y.sum().backward()
    other_y.sum().backward()
    for a, b in zip(lk.adapter_parameters(model), lk.adapter_parameters(other), strict=True):
        assert a.dtype == b.dtype == (dtype if dtype.itemsize >= 4 else torch.float32)
        assert_close(a.grad, b.grad, dtype)


@over_variants
@over_cases
def test_only_the_adapter_gets_gradients_and_a_step_changes_only_it(case, variant):
    model, inputs = case.build()
    base = clones(model.state_dict())
    lk.attach(model, variant, **case.how)
    randomize(model)
    mine = {id(p) for p in lk.adapter_parameters(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    before = clones(factors_of_flat(model))
    run(model, inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in mine) == (parameter.grad is not None), name
    optimizer.step()
    state = model.state_dict()
    assert_bits({key: state[key] for key in base}, base)
    for key, value in factors_of_flat(model).items():
        assert not torch.equal(value, before[key])


def factors_of_flat(model):
    return {f"{w}.{t}": value for w, pair in factors_of(model).items() for t, value in zip("AB", pair, strict=True)}


@over_variants
@over_cases
def test_the_adapter_acts_in_train_and_in_eval_and_in_fused_paths(case, variant):
    model, inputs = case.build()
    plain = copy.deepcopy(model)
    lk.attach(model, variant, **case.how)
    randomize(model)
    wanted = run_everywhere(dense_lora(plain, factors_of(model), scale_of(variant)), inputs)
    for regime, y in run_everywhere(model, inputs).items():
        assert_close(y, wanted[regime])
    before = picture(model)
    report = lk.probe(model, *inputs)
    assert report.ok
    assert [row.weight for row in report.weights] == list(lk.adapters(model)["default"].weights)
    assert_same(picture(model), before)
