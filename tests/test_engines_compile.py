"""Law 8, compiled half: torch.compile and torch.export see what eager execution sees."""

import copy

import pytest
import torch
from helpers import assert_close, attached, randomize, run
from kinds import CASES
from models import mlp
from torch import nn

import lorakit as lk

over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])
over_compilable = pytest.mark.parametrize("case", [c for c in CASES if c.compiles], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


@over_compilable
def test_one_graph_gives_the_eager_outputs_and_gradients(case):
    model, inputs = case.build()
    attached(model, **case.how)
    fast = compiled(model)
    y = run(model, inputs)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in lk.adapter_parameters(model)]
    model.zero_grad()
    got = run(fast, inputs)
    assert_close(got, y)
    got.square().sum().backward()
    for parameter, gradient in zip(lk.adapter_parameters(model), gradients, strict=True):
        assert_close(parameter.grad, gradient)
    with torch.no_grad():
        model.eval()
        assert_close(run(fast, inputs), run(model, inputs))


@over_modes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_inductor_backend(mode):
    model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
    fast = compiled(model, "inductor")
    assert_close(fast(x), model(x))
    with lk.disabled(model):
        assert_close(fast(x), model(x))


@over_modes
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable-base", "frozen-base"])
@torch._dynamo.config.patch(recompile_limit=32)
def test_every_verb_takes_effect_on_a_model_that_was_compiled_before(mode, frozen, tmp_path):
    torch.manual_seed(0)
    model, x = mlp().requires_grad_(not frozen), torch.randn(3, 6)
    fast = compiled(model)
    base = fast(x)
    lk.save(attached(copy.deepcopy(model), mode=mode, seed=5), tmp_path / "c")

    def agrees(where, changed=True):
        y = model(x)
        assert torch.allclose(fast(x), y, atol=1e-5), f"stale after: {where}"
        assert torch.equal(y, base) != changed, where

    attached(model, mode=mode, name="a")
    agrees("attach")
    attached(model, mode=mode, name="b", seed=2)
    agrees("a second one")
    lk.activate(model, {"a": 0.5, "b": -1.0})
    agrees("activate")
    with lk.disabled(model):
        agrees("disabled", changed=False)
    agrees("after disabled")
    with lk.merged(model):
        agrees("merged")
    agrees("after merged")
    lk.remove(model, "b")
    agrees("remove")
    lk.load(model, tmp_path / "c", name="c")
    agrees("load")
    lk.detach(model)
    agrees("detach", changed=False)
    attached(model, mode=mode, name="d", seed=3)
    agrees("attached again")
    lk.merge(model)
    agrees("merge")


@over_modes
def test_training_a_compiled_model_is_training_the_model(mode):
    torch.manual_seed(0)
    eager = mlp()
    lk.attach(eager, lk.LoRA(rank=2), mode=mode)
    model, x = copy.deepcopy(eager), torch.randn(8, 6)
    for net, parameters in ((eager, lk.adapter_parameters(eager)), (compiled(model), lk.adapter_parameters(model))):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(lk.adapter_parameters(eager), lk.adapter_parameters(model), strict=True):
        assert_close(b, a)


@over_modes
def test_verbs_on_the_compiled_wrapper_act_on_the_model_inside(mode, tmp_path):
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 6)
    fresh = copy.deepcopy(model)
    fast = compiled(model)
    lk.attach(fast, lk.LoRA(rank=2), mode=mode)
    randomize(fast)
    assert_close(fast(x), model(x))
    assert lk.adapters(fast)["default"].weights == ("0.weight", "2.weight")
    assert lk.adapters(model) == lk.adapters(fast)
    lk.save(fast, tmp_path / "a")
    lk.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))
    lk.detach(fast)
    assert lk.adapters(model) == {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x).relu()


@over_modes
def test_a_module_compiled_in_place(mode):
    model, x = Net(), torch.randn(3, 6)
    model.compile(fullgraph=True, backend="eager")
    base = model(x)
    attached(model, mode=mode)
    assert_close(model(x), model.layer(x).relu())
    assert not torch.equal(model(x), base)


@over_modes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_parts_compiled_on_their_own(mode):
    model, x = nn.Sequential(Net(), nn.Linear(4, 6), Net()), torch.randn(3, 6)
    attached(model, mode=mode)
    y = model(x)
    model[0].compile(fullgraph=True, backend="eager")
    model[2].compile(fullgraph=True, backend="eager")
    assert_close(model(x), y)
    with lk.disabled(model):
        base = model(x)
    assert not torch.allclose(base, y)
    assert_close(model(x), y)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_keeps_the_adapter(case, training):
    model, inputs = case.build()
    attached(model, **case.how)
    model.train(training)
    program = torch.export.export(model, inputs)
    assert_close(run(program.module(), inputs), run(model, inputs))
    with lk.disabled(model):
        base = torch.export.export(model, inputs)
        assert_close(run(base.module(), inputs), run(model, inputs))
