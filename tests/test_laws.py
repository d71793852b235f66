"""Laws 1–5 and 7 of the design, each over every kind of layer and every variant."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    attach,
    attached,
    clones,
    dense,
    dense_lora,
    factors_of,
    picture,
    randomize,
    refused,
    run,
    run_everywhere,
    storage,
    tensors_of,
)
from kinds import CASES, VARIANTS, Case, over_cases, over_pairs, over_pairs_and_dtypes, refusal
from oracles import dense_updates

import lorakit as lk
from lorakit.layers import KINDS, Foreign
from lorakit.variants import VARIANTS as KNOWN


def assert_as_bare(case: Case, got, *bare) -> None:
    """To the bit what the bare model gives; torch's attention takes another kernel where less is trainable."""
    for regime, y in got.items():
        if case.leaves_fused_path and regime == "inference":
            assert_close(y, bare[0][regime])
        else:
            assert any(torch.equal(y, outputs[regime]) for outputs in bare), regime


@over_pairs_and_dtypes
def test_attaching_and_disabling_change_no_bit_and_detaching_leaves_nothing(case, variant, dtype):
    model, inputs = case.build(dtype)
    before, base = picture(model), run_everywhere(model, inputs)
    bare = copy.deepcopy(model).requires_grad_(False)
    frozen = run_everywhere(bare, inputs)
    attach(model, case, variant, inputs)
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


@over_pairs
def test_the_base_keeps_its_keys_values_storage_and_class(case, variant):
    model, inputs = case.build()
    base, places = clones(model.state_dict()), storage(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    plan = attach(model, case, variant, inputs)
    randomize(model)
    state = model.state_dict()
    kept = {key: value for key, value in state.items() if key in base}
    assert_bits(kept, base)
    assert storage(kept) == places
    mine = {key for weight in lk.adapters(model)["default"].weights for key in tensors_of(model, weight)}
    assert set(state) - set(base) == mine if case.functional else set(state) - set(base) > mine  # twice, if shared
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


@over_pairs
def test_outputs_and_gradients_are_those_of_the_dense_formula(case, variant):
    model, inputs = case.build(torch.float64)
    plain = copy.deepcopy(model)
    attach(model, case, variant, inputs)
    randomize(model)
    leaves, updates = dense_updates(plain, model, variant)
    x, same_x = (tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs) for _ in range(2))
    wanted = run(dense(plain, updates), same_x)
    got = run(model, x)
    assert_close(got, wanted)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    got.backward(cotangent)
    mine = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert set(mine) == set(leaves)
    for key, leaf in leaves.items():
        assert_close(mine[key].grad, leaf.grad)
    for a, b in zip(x, same_x, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_close(a.grad, b.grad)


@over_pairs_and_dtypes
def test_beside_and_in_the_weight_agree(case, variant, dtype):
    if case.mode == "weight":
        return
    model, inputs = case.build(dtype)
    other = copy.deepcopy(model)
    attach(model, case, variant, inputs)
    plan = attach(other, replace(case, mode="weight"), variant, inputs)
    assert {row.applied for row in plan.rows} == {"in the weight"}
    for each in (model, other):
        each.load_state_dict(model.state_dict(), strict=True)  # the same frozen tensors
        randomize(each)
    y, other_y = run(model, inputs), run(other, inputs)
    assert_close(y, other_y)
    y.sum().backward()
    other_y.sum().backward()
    for a, b in zip(lk.adapter_parameters(model), lk.adapter_parameters(other), strict=True):
        assert a.dtype == b.dtype == (dtype if dtype.itemsize >= 4 else torch.float32)
        assert_close(a.grad, b.grad, dtype, case.rounding)


@over_pairs
def test_only_the_adapter_gets_gradients_and_a_step_changes_only_it(case, variant):
    model, inputs = case.build()
    base = clones(model.state_dict())
    attach(model, case, variant, inputs)
    randomize(model)
    mine = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert {id(p) for p in mine.values()} == {id(p) for p in lk.adapter_parameters(model)}
    before = clones(model.state_dict())
    optimizer = torch.optim.AdamW(lk.adapter_parameters(model), lr=0.1, weight_decay=0.1)
    run(model, inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (name in mine) == (parameter.grad is not None), name
    optimizer.step()
    state = model.state_dict()
    assert_bits({key: state[key] for key in base}, base)
    for key in state:
        assert torch.equal(state[key], before[key]) == (key not in mine), key


@over_pairs
def test_the_adapter_acts_in_train_and_in_eval_and_in_fused_paths(case, variant):
    model, inputs = case.build()
    plain = copy.deepcopy(model)
    attach(model, case, variant, inputs)
    randomize(model)
    wanted = run_everywhere(dense(plain, dense_updates(plain, model, variant)[1]), inputs)
    for regime, y in run_everywhere(model, inputs).items():
        assert_close(y, wanted[regime])
    before = picture(model)
    report = lk.probe(model, *inputs)
    assert report.ok
    assert [row.weight for row in report.weights] == list(lk.adapters(model)["default"].weights)
    assert_same(picture(model), before)


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in VARIANTS if refusal(case, name)],
)
def test_a_pair_without_meaning_is_refused_with_the_reason(case, name):
    model, inputs = case.build()
    with refused(model, refusal(case, name)):
        attach(model, case, VARIANTS[name], inputs)


def test_no_kind_and_no_variant_is_left_out():
    assert {type(variant) for variant in VARIANTS.values()} == set(KNOWN.values())
    assert {variant.init for variant in VARIANTS.values() if isinstance(variant, lk.LoRA)} | {"loftq"} == {
        *lk.LoRA.inits
    }
    kinds = set()
    for case in CASES:
        model, _ = case.build()
        kinds |= {row.kind for row in lk.plan(model, lk.LoRA(rank=1), **case.how).rows}
    assert kinds == {kind.name for kind in KINDS} - {Foreign.name}  # its laws are in test_quantized*.py
