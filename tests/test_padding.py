"""Adapters loaded with a larger rank: the same function, in a shape that others have."""

import copy

import pytest
import torch
from helpers import assert_close, attach, randomize, refused, run
from kinds import CASES, VARIANTS, refusal
from torch._dynamo.utils import counters

import lorakit as lk

LOW_RANK = [name for name, variant in VARIANTS.items() if isinstance(variant, lk.LoRA | lk.DoRA | lk.LoRAFA)]
SOME = ["linear", "linear-weight", "conv2d-groups", "embedding", "parameter-3d", "attention-whole"]
over = pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        if case.name in SOME
        for name in LOW_RANK
        if refusal(case, name) is None
    ],
)


@over
def test_the_same_function_in_training_too_and_again_from_its_own_file(case, name, tmp_path):
    model, inputs = case.build(torch.float64)
    plain = copy.deepcopy(model)
    attach(model, case, VARIANTS[name], inputs)
    randomize(model)
    lk.save(model, tmp_path / "small")
    wider, rank = copy.deepcopy(plain), VARIANTS[name].rank + 1
    plan = lk.load(wider, tmp_path / "small", rank=rank, trainable=True)
    assert plan.variant.rank == rank
    assert plan.parameters == sum(p.numel() for p in lk.adapter_parameters(wider))
    assert plan.parameters > sum(p.numel() for p in lk.adapter_parameters(model))
    assert_close(run(wider, inputs), run(model, inputs))
    for each in (model, wider):
        optimizer = torch.optim.SGD(lk.adapter_parameters(each), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(each, inputs).square().mean().backward()
            optimizer.step()
    assert_close(run(wider, inputs), run(model, inputs))
    lk.save(wider, tmp_path / "large")
    again = copy.deepcopy(plain)
    lk.load(again, tmp_path / "large")
    assert torch.equal(run(again, inputs), run(wider, inputs))


def test_compiled_code_takes_adapters_that_had_other_ranks(base, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    ranks = (1, 2, 4)
    for rank in ranks:
        model = copy.deepcopy(base)
        lk.attach(model, lk.LoRA(rank=rank, alpha=3))
        randomize(model, seed=rank)
        lk.save(model, tmp_path / str(rank))
    for rank in ranks:
        lk.load(base, tmp_path / str(rank), name=f"r{rank}", rank=4)
    fast, x = torch.compile(base, fullgraph=True, backend="eager"), torch.randn(3, 6)
    for i in range(33):
        lk.activate(base, f"r{ranks[i % 3]}")
        assert_close(fast(x), base(x))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_what_is_trained_as_a_whole_stays_as_it_is(base, tmp_path):
    other, x = copy.deepcopy(base), torch.randn(3, 6)
    lk.attach(other, lk.LoRA(rank=2), "0", train_also=["2"])
    randomize(other)
    lk.save(other, tmp_path / "both")
    lk.load(base, tmp_path / "both", rank=4)
    assert_close(base(x), other(x))


def test_a_rank_that_cannot_be_is_refused(base, saved, tmp_path):
    for rank, word in ((1, "its rank is 2"), (0, "rank=0"), ("4", "rank='4'")):
        with refused(base, word):
            lk.load(base, saved, name="new", rank=rank)
    other = copy.deepcopy(base)
    lk.attach(other, lk.LoHa(rank=2))
    lk.save(other, tmp_path / "loha")
    with refused(base, "LoHa has no factors"):
        lk.load(base, tmp_path / "loha", rank=4)
