"""`plan` counts right, prints what it says, and changes nothing; hyper-parameters are checked where they are given."""

import math
from fractions import Fraction

import numpy
import pytest
import torch
from helpers import assert_same, picture, refused
from kinds import over_cases, over_loras
from models import Experts, mlp
from torch import nn

import lorakit as lk


@over_loras
@over_cases
def test_a_plan_changes_nothing_and_is_what_attach_returns(case, variant):
    model, _ = case.build()
    before, state = picture(model), torch.get_rng_state()
    plan = lk.plan(model, variant, **case.how)
    assert_same(picture(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    base = sum(p.numel() for p in model.parameters())
    assert lk.attach(model, variant, **case.how) == plan
    mine = lk.adapter_parameters(model)
    assert plan.parameters == sum(p.numel() for p in mine) == lk.adapters(model)["default"].parameters
    assert plan.base_parameters == base
    assert [size for row in plan.rows for size in row.tensors.values()] == [tuple(p.shape) for p in mine]
    for row in plan.rows:
        (_, *inputs), (d, *_) = row.tensors["A"], row.tensors["B"]
        k = math.prod(inputs)
        if row.kind == "Slices":
            slices, _, k = row.tensors["A"]
            assert row.weight == (3 * k, k)
            assert row.parameters == slices * variant.rank * 2 * k
        elif row.kind == "Parameter" and len(row.weight) == 3:
            experts, d, k = row.weight
            assert row.parameters == experts * variant.rank * (d + k)
        else:
            assert d * k == math.prod(row.weight)
            assert row.parameters == variant.rank * (d + k)


@over_cases
def test_a_plan_of_a_model_without_values_is_the_same(case):
    model, _ = case.build()
    plan = lk.plan(model, lk.LoRA(rank=2), **case.how)
    with torch.device("meta"):
        empty = case.make()
    assert lk.plan(empty, lk.LoRA(rank=2), **case.how) == plan


def test_a_plan_of_a_model_too_large_to_hold():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**16, 2**16) for _ in range(16)))
    plan = lk.plan(model, lk.LoRA(rank=16))
    assert plan.parameters == 16 * 16 * 2 * 2**16
    assert plan.percent == pytest.approx(100 * 32 / (2**16 + 1))


def test_a_plan_prints_every_fact_it_holds():
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))
    text = str(lk.plan(model, lk.LoRA(rank=16), ["0", "2.weight"], name="digits"))
    first, header, *rows, last, adam = text.splitlines()
    assert first.startswith("digits: LoRA(rank=16")
    assert header.split() == ["layer", "kind", "W", "A", "B", "applied", "parameters", "of", "W", "note"]
    assert rows[0].split()[:6] == ["0", "Linear", "1000×784", "16×784", "1000×16", "beside"]
    assert "28,544" in rows[0]
    assert rows[1].split()[:5] == ["2.weight", "Linear", "10×1000", "16×1000", "10×16"]
    assert "in the weight" in rows[1]
    assert "rank 16 is above min(d, k) = 10" in rows[1]
    assert "44,704 new numbers beside 795,010 frozen ones: 5.623%" in last
    assert adam == "Adam's state: 357.6 kB; 6.4 MB to train all of the base"
    assert "note" not in str(lk.plan(model, lk.LoRA(rank=1)))


def test_adapters_that_are_there_do_not_count_as_base():
    model = mlp()
    plan = lk.attach(model, lk.LoRA(rank=2))
    assert lk.plan(model, lk.LoRA(rank=2), name="second").base_parameters == plan.base_parameters


def test_a_rank_above_what_the_weight_can_hold_warns():
    model = mlp()
    with pytest.warns(UserWarning, match=r"'2'.*min\(d, k\) = 4"):
        lk.attach(model, lk.LoRA(rank=5), targets="2")
    with pytest.warns(UserWarning, match="without effect") as caught:
        lk.attach(model, lk.LoRA(rank=9), name="both")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    lk.attach(model, lk.LoRA(rank=4), name="exact")


BAD = {
    "rank-0": {"rank": 0},
    "rank-negative": {"rank": -1},
    "rank-bool": {"rank": True},
    "rank-float": {"rank": 1.5},
    "rank-whole-float": {"rank": 8.0},
    "rank-text": {"rank": "8"},
    "rank-none": {"rank": None},
    "rank-huge": {"rank": 10**18},
    "rank-beyond-64-bits": {"rank": 10**30},
    "alpha-nan": {"rank": 2, "alpha": math.nan},
    "alpha-inf": {"rank": 2, "alpha": math.inf},
    "alpha-0": {"rank": 2, "alpha": 0},
    "alpha-negative": {"rank": 2, "alpha": -1.0},
    "alpha-bool": {"rank": 2, "alpha": True},
    "alpha-text": {"rank": 2, "alpha": "2"},
    "alpha-huge": {"rank": 2, "alpha": 10**400},
    "dropout-1": {"rank": 2, "dropout": 1.0},
    "dropout-negative": {"rank": 2, "dropout": -0.1},
    "dropout-nan": {"rank": 2, "dropout": math.nan},
    "dropout-bool": {"rank": 2, "dropout": False},
    "scaling": {"rank": 2, "scaling": "rs"},
    "scaling-list": {"rank": 2, "scaling": ["rslora"]},
    "init": {"rank": 2, "init": "xavier"},
    "init-none": {"rank": 2, "init": None},
    "std-without-gaussian": {"rank": 2, "std": 0.1},
    "std-0": {"rank": 2, "init": "gaussian", "std": 0.0},
    "std-nan": {"rank": 2, "init": "gaussian", "std": math.nan},
}


@pytest.mark.parametrize("bad", BAD)
def test_hyper_parameters_out_of_range_are_refused_by_name(bad):
    arguments = BAD[bad]
    name, value = list(arguments.items())[-1]
    if bad == "std-without-gaussian":
        name, value = "init", "kaiming"
    with pytest.raises(lk.LorakitError) as caught:
        lk.LoRA(**arguments)
    assert name in str(caught.value)
    assert len(str(value)) > 50 or str(value) in str(caught.value)


def test_hyper_parameters_are_values():
    assert lk.LoRA(rank=8).scale == lk.LoRA(rank=8, alpha=8).scale == 1
    assert lk.LoRA(rank=8) != lk.LoRA(rank=8, alpha=16)
    with pytest.raises(AttributeError):
        lk.LoRA(rank=8).rank = 4


@pytest.mark.parametrize("number", [numpy.float32(4), numpy.float64(4), numpy.int64(4), Fraction(4)], ids=repr)
def test_a_number_of_any_sort_is_taken_whole_or_refused(number, tmp_path):
    try:
        lora = lk.LoRA(rank=2, alpha=number)
    except lk.LorakitError:
        return
    assert lora == lk.LoRA(rank=2, alpha=4)
    model = mlp()
    lk.attach(model, lora)
    lk.save(model, tmp_path / "adapter")
    lk.detach(model)
    lk.load(model, tmp_path / "adapter")
    assert lk.adapters(model)["default"].variant == lora


def test_dropout_in_the_weight_is_refused():
    model = mlp()
    lora = lk.LoRA(rank=2, dropout=0.1)
    for how in ({"mode": "weight"}, {"targets": "0.weight"}):
        with refused(model, "dropout", "'0"):
            lk.attach(model, lora, **how)
    lk.attach(model, lora)


def test_each_way_to_begin_draws_what_it_says():
    torch.manual_seed(0)
    model = nn.Linear(400, 300)
    for name, lora, std, most in [
        ("kaiming", lk.LoRA(rank=50), 1 / math.sqrt(3 * 400), 1 / math.sqrt(400)),
        ("gaussian", lk.LoRA(rank=50, init="gaussian", std=0.3), 0.3, math.inf),
        ("default-std", lk.LoRA(rank=50, init="gaussian"), 1 / 50, math.inf),
    ]:
        lk.attach(model, lora, name=name)
        A, B = lk.adapter_parameters(model, name)
        assert A.std().item() == pytest.approx(std, rel=0.05)
        assert A.mean().abs().item() < 0.05 * std
        assert A.abs().max().item() <= most
        assert not B.any()


def test_a_rank_above_that_of_an_expert_is_refused():
    model = Experts()
    with refused(model, "'weight'", "rank 6", "3 matrices of 6×5", "at most 5"):
        lk.attach(model, lk.LoRA(rank=6), "weight")
