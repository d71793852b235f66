"""Compiled once, an adapted model switches adapters, strengths and scales as often as one likes."""

import pytest
import torch
from helpers import assert_close, attached, run
from kinds import CASES, VARIANTS
from models import mlp
from torch._dynamo.utils import counters

import lorakit as lk

NAMES = ["a", "b", "c", "d"]
ALPHAS = (lk.LoRA(rank=2, alpha=2), lk.LoRA(rank=2, alpha=5))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def several(make=mlp, variants=ALPHAS, trainable=False, **how):
    torch.manual_seed(0)
    model = make()
    for i, name in enumerate(NAMES):
        attached(model, variants[i % len(variants)], name=name, seed=i, **how)
    for name in NAMES:
        lk.set_trainable(model, name, trainable)
    return model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_switching_compiles_nothing_anew(grad, trainable):
    model, x = several(trainable=trainable), torch.randn(3, 6)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad):
        for i in range(33):
            lk.activate(model, NAMES[i % 4])
            y = fast(x)
            assert_close(y, model(x))
            if trainable and grad:
                model.zero_grad()
                y.square().sum().backward()
                mine = lk.adapter_parameters(model, NAMES[i % 4])
                assert all(p.grad is not None for p in mine)
                assert sum(p.grad is not None for p in lk.adapter_parameters(model)) == len(mine)
            if i == 0:
                first = graphs()
    assert graphs() == first == 1


def test_strengths_compile_nothing_anew():
    model, x = several(), torch.randn(3, 6)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for i in range(33):
        strengths = {"a": 1 - i / 32, "b": i / 32} if i % 2 else {"a": 0.5, "b": 0.5}
        lk.activate(model, strengths)
        assert_close(fast(x), model(x))
    assert graphs() == 1
    lk.activate(model, {"a": 0.5, "b": 1.0, "c": 0.5})
    assert_close(fast(x), model(x))
    assert graphs() == 2  # three at a time are another sum


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_switches(name):
    case = CASES[0]
    torch.manual_seed(0)
    model, inputs = case.build()
    how = {"data": [inputs], "loss": lambda model, batch: run(model, batch).square().mean()}
    for i, each in enumerate(NAMES):
        attached(model, VARIANTS[name], name=each, seed=i, **(how if VARIANTS[name].needs else {}))
    for each in NAMES:
        lk.set_trainable(model, each, False)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for i in range(9):
        lk.activate(model, NAMES[i % 4])
        assert_close(run(fast, inputs), run(model, inputs))
    assert graphs() == 1


def test_in_the_weight_too():
    model, x = several(variants=[lk.LoRA(rank=2)], mode="weight"), torch.randn(3, 6)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for i in range(9):
        lk.activate(model, {NAMES[i % 4]: 1 - i / 16})
        assert_close(fast(x), model(x))
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_with_inductor():
    model, x = several(), torch.randn(3, 6)
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for i in range(8):
            lk.activate(model, {NAMES[i % 4]: 1 - i / 16})
            assert_close(fast(x), model(x))
    assert graphs() == 1
