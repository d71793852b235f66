"""Several adapters on one model: choosing, mixing, merging and removing them. Shared and tied weights (law 9)."""

import copy

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    attached,
    clones,
    dense,
    dense_lora,
    factors_of,
    picture,
    product,
    randomize,
    refused,
    run,
    run_everywhere,
    scale_of,
)
from kinds import LORAS, over_cases, over_dtypes
from models import Tied, mlp, shared
from torch import nn

import lorakit as lk

MIXES = [["a"], ["b", "a"], {"a": 0.5}, {"a": -1.0, "b": 2}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"b": 0.0}, []]


def three(model, how):
    """Adapters a, b and c of three variants."""
    for i, name in enumerate("abc"):
        lk.attach(model, list(LORAS.values())[i], **how, name=name)
        randomize(model, name, seed=i)
    return model


def strengths(mix) -> dict[str, float]:
    return dict(mix) if isinstance(mix, dict) else dict.fromkeys(mix, 1.0)


def mixed(plain, model, mix):
    """The dense formula: W + Σ strength·s·B·A."""
    total = {}
    for name, strength in strengths(mix).items():
        scale = strength * scale_of(lk.adapters(model)[name].variant)
        for weight, (A, B) in factors_of(model, name).items():
            total[weight] = total.get(weight, 0) + scale * product(plain, weight, A, B)
    return dense(plain, total)


@over_dtypes
@over_cases
def test_strengths_combine_linearly_and_merge_alike(case, dtype):
    model, inputs = case.build(dtype)
    plain = copy.deepcopy(model)
    three(model, case.how)
    for mix in MIXES:
        wanted = run_everywhere(mixed(plain, model, mix), inputs)
        lk.activate(model, mix)
        assert {n: a.strength for n, a in lk.adapters(model).items() if a.strength} == {
            n: s for n, s in strengths(mix).items() if s
        }
        for regime, y in run_everywhere(model, inputs).items():
            assert_close(y, wanted[regime], factor=3)
        lk.activate(model, "c")
        with lk.active(model, mix):
            assert_close(run(model, inputs), wanted["train"], factor=3)
        if mix:
            with lk.merged(model, mix):
                assert_close(run(model, inputs), wanted["train"], factor=3)


@over_cases
def test_switching_changes_the_choice_and_nothing_else(case):
    model, inputs = case.build()
    three(model, case.how)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, outputs = picture(model), {}
    for name in "abc":
        lk.activate(model, name)
        outputs[name] = run(model, inputs)
    assert not torch.equal(outputs["a"], outputs["b"])
    with lk.active(model, "a"), lk.disabled(model), lk.active(model, {"b": 1.0}):
        assert torch.equal(run(model, inputs), outputs["b"])
    assert torch.equal(run(model, inputs), outputs["c"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert_same(picture(model), before)


@pytest.mark.parametrize("block", [lk.disabled, lambda m: lk.active(m, "a"), lambda m: lk.merged(m, ["a", "b"])])
def test_an_exception_inside_a_block_restores_what_was_before(block):
    model, x = three(mlp(), {}), torch.randn(3, 6)
    lk.activate(model, {"a": 0.3, "c": 2.0})
    y, state = model(x), clones(model.state_dict())
    with pytest.raises(KeyError, match="mine"), block(model):
        raise KeyError("mine")
    assert torch.equal(model(x), y)
    assert_bits(model.state_dict(), state)


def test_the_newest_adapter_is_the_active_and_the_trained_one():
    model = three(mlp(), {})
    assert {name: (a.strength, a.trainable) for name, a in lk.adapters(model).items()} == {
        "a": (0.0, False),
        "b": (0.0, False),
        "c": (1.0, True),
    }
    lk.set_trainable(model, "a", True)
    lk.set_trainable(model, "c", False)
    wanted = {id(p) for p in lk.adapter_parameters(model, "a")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    assert len(lk.adapter_parameters(model)) == 3 * len(lk.adapter_parameters(model, "a"))


@over_cases
def test_removing_adapters_one_by_one_ends_at_the_bare_model(case):
    model, inputs = case.build()
    before, base = picture(model), run(model, inputs)
    three(model, case.how)
    lk.activate(model, ["a", "b"])
    lk.remove(model, "c")
    both = run(model, inputs)
    lk.remove(model, "b")
    assert not torch.equal(run(model, inputs), both)
    assert {name: a.strength for name, a in lk.adapters(model).items()} == {"a": 1.0}
    with lk.active(model, []):
        lk.attach(model, lk.LoRA(rank=1), **case.how, name="d")
        lk.remove(model, "a")
    assert {name: a.strength for name, a in lk.adapters(model).items()} == {"d": 0.0}
    assert_close(run(model, inputs), base)
    lk.remove(model, "d")
    assert_same(picture(model), before)


def test_adapters_of_one_model_may_sit_in_different_places_and_ways():
    torch.manual_seed(0)
    plain, x = mlp(), torch.randn(3, 6)
    model = copy.deepcopy(plain)
    for name, how in {
        "a": {"targets": "0"},
        "b": {"targets": ["0", "2"], "mode": "weight"},
        "c": {"targets": "2.weight"},
    }.items():
        lk.attach(model, lk.LoRA(rank=2, alpha=3), **how, name=name)
        randomize(model, name, seed=ord(name))
    for mix in MIXES:
        lk.activate(model, mix)
        assert_close(model(x), mixed(plain, model, mix)(x))
    lk.activate(model, "a")
    y = model(x)
    lk.remove(model, "b")
    lk.remove(model, "c")
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert torch.equal(model(x), y)


BAD_CHOICES = {
    "unknown": ("d", "'d'"),
    "unknown-of-several": (["a", "d", "e"], "'d', 'e'"),
    "twice": (["a", "a"], "twice"),
    "nan": ({"a": float("nan")}, "finite"),
    "infinity": ({"a": float("inf")}, "finite"),
    "huge": ({"a": 10**400}, "finite"),
    "bool": ({"a": True}, "finite"),
    "text": ({"a": "1"}, "finite"),
    "number": (3, "no choice"),
    "none": (None, "no choice"),
    "keys": ([1, 2], "no choice"),
    "bytes": (b"a", "no choice"),
}


@pytest.mark.parametrize("choice", BAD_CHOICES)
def test_a_choice_that_makes_no_sense_is_refused(choice):
    model = three(mlp(), {})
    bad, word = BAD_CHOICES[choice]
    with refused(model, word):
        lk.activate(model, bad)
    with refused(model, word), lk.active(model, bad):
        pass


def test_verbs_on_a_model_without_adapters_say_so():
    model = mlp()
    for verb in (lk.detach, lk.merge, lk.adapter_parameters, lk.adapter_state_dict, lk.probe):
        with refused(model, "no adapter"):
            verb(model)
    for block in (lk.disabled, lk.merged):
        with refused(model, "no adapter"), block(model):
            pass
    assert lk.adapters(model) == {}
    with pytest.raises(lk.LorakitError, match=r"nn\.Module"):
        lk.adapters(mlp)


def test_a_shared_module_is_adapted_once_and_the_plan_says_so():
    torch.manual_seed(0)
    model, x = shared(), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    (row,) = lk.attach(model, lk.LoRA(rank=2)).rows
    assert row.note == "also 2"
    randomize(model)
    wanted = dense_lora(plain, factors_of(model), 1.0)(x)
    assert_close(model(x), wanted)
    lk.merge(model)
    assert model[0] is model[2]
    assert_close(model(x), wanted)
    for targets in ("2", ["0", "2"]):
        assert len(lk.plan(model, lk.LoRA(rank=2), targets=targets).rows) == 1


@pytest.mark.parametrize("targets", ["head", "head.weight", "embedding.weight"])
def test_only_the_adapted_one_of_two_tied_weights_changes(targets):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(6)
    mine, other = ("embedding", "head") if targets.startswith("e") else ("head", "embedding")
    plain = copy.deepcopy(model)
    (row,) = lk.attach(model, lk.LoRA(rank=2), targets=targets).rows
    assert row.note == f"tied to {other}.weight"
    randomize(model)
    bare = plain.get_submodule(other).weight
    wanted = dense_lora(plain, factors_of(model), 1.0)(tokens)
    assert_close(model(tokens), wanted)
    assert torch.equal(model.get_submodule(other).weight, bare)
    with lk.merged(model):
        assert_close(model(tokens), wanted)
        assert torch.equal(model.get_submodule(other).weight, bare)
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    with pytest.warns(UserWarning, match="untied"):
        lk.merge(model)
    assert_close(model(tokens), wanted)
    assert torch.equal(model.get_submodule(other).weight, bare)
    assert not torch.equal(model.get_submodule(mine).weight, bare)


def test_both_of_two_tied_weights_can_be_adapted_each_in_its_own_way():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(6)
    plain = copy.deepcopy(model)
    before = picture(model)
    lk.attach(model, lk.LoRA(rank=2), targets=["embedding.weight", "head"])
    randomize(model)
    wanted = dense_lora(plain, factors_of(model), 1.0)(tokens)
    assert_close(model(tokens), wanted)
    with lk.merged(model):
        assert_close(model(tokens), wanted)
    lk.detach(model)
    assert_same(picture(model), before)
    assert model.head.weight is model.embedding.weight


def test_loading_leaves_the_adapter_in_training_alone(tmp_path):
    model = attached(mlp(), name="a")
    lk.save(model, tmp_path / "a")
    lk.load(model, tmp_path / "a", name="b")
    assert lk.adapters(model)["a"].trainable and not lk.adapters(model)["b"].trainable
    lk.load(model, tmp_path / "a", name="c", trainable=True)
    assert [adapter.trainable for adapter in lk.adapters(model).values()] == [False, False, True]


def test_a_failure_leaves_what_trains_as_it_was(monkeypatch):
    from lorakit import change

    model, add_one, calls = attached(mlp(), name="a"), change._add_one, []

    def failing(addition, *rest):
        calls.append(addition)
        if len(calls) == 1:
            raise RuntimeError("no")
        add_one(addition, *rest)

    monkeypatch.setattr(change, "_add_one", failing)
    with pytest.raises(RuntimeError, match="no"):
        lk.attach(model, lk.LoRA(rank=2), targets="2", name="b")
    monkeypatch.undo()
    assert list(lk.adapters(model)) == ["a"]
    assert lk.adapters(model)["a"].trainable and lk.adapters(model)["a"].strength == 1
