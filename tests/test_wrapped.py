"""Models in containers, compiled ones, and scripted ones, which see no adapter and are refused."""

import copy

import pytest
import torch
from helpers import assert_close, attached
from models import mlp
from torch import nn

import lorakit as lk

# torch's own, on newer versions of Python.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Outer(nn.Module):
    """A scripted module and a plain layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.inner(x))


SCRIPTED = {
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), mlp())),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.BatchNorm1d(6), mlp()).eval(), torch.randn(3, 6)),
}
over_scripted = pytest.mark.parametrize("make", SCRIPTED.values(), ids=SCRIPTED)


@over_scripted
@pytest.mark.parametrize("targets", ["all-linear", "1.0", "1.0.weight", "1", lambda name, module: name.endswith("1.0")])
def test_what_is_scripted_is_refused_with_the_reason(make, targets):
    script = make()
    for model in (script, Outer(script), nn.ModuleList([script])):
        keys, y = list(model.state_dict()), script(torch.ones(3, 6))
        for verb in (lk.plan, lk.attach):
            with pytest.raises(lk.LorakitError, match=r"scripted module.*sees no hook"):
                verb(model, lk.LoRA(rank=2), targets)
        assert list(model.state_dict()) == keys
        assert lk.adapters(model) == {}
        assert torch.equal(script(torch.ones(3, 6)), y)


@over_scripted
def test_what_stands_beside_a_scripted_module_is_adapted(make, tmp_path):
    model, x = Outer(make()).eval(), torch.randn(3, 6)
    plain, buffers = model(x), [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(lk.LorakitError, match="of scripted modules the types are lost"):
        lk.attach(model, lk.LoRA(rank=2), nn.BatchNorm1d)
    attached(model, exclude="inner")
    assert lk.adapters(model)["default"].weights == ("head.weight",)
    y = model(x)
    assert lk.probe(model, x).ok
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    lk.save(model, tmp_path / "a")
    with lk.merged(model):
        assert_close(model(x), y)
    lk.detach(model)
    assert torch.equal(model(x), plain)
    lk.load(model, tmp_path / "a")
    assert torch.equal(model(x), y)
    lk.merge(model)
    assert_close(model(x), y)


def test_a_file_for_what_is_scripted_now_is_refused(tmp_path):
    model = mlp()
    lk.save(attached(copy.deepcopy(model)), tmp_path / "a")
    with pytest.raises(lk.LorakitError, match="scripted module"):
        lk.load(torch.jit.script(model), tmp_path / "a")


def test_an_adapted_model_is_traced_as_it_acts_and_never_scripted_without_its_adapter():
    for mode in ("auto", "weight"):
        model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
        traced = torch.jit.trace(model, x)
        assert_close(traced(x), model(x))
        with pytest.raises((RuntimeError, ValueError, TypeError, OSError, torch.jit.frontend.FrontendError)):
            torch.jit.script(model)


CONTAINERS = {
    "list": (lambda inner: nn.ModuleList([inner]), "0."),
    "dict": (lambda inner: nn.ModuleDict({"net": inner}), "net."),
    "nested": (lambda inner: nn.ModuleDict({"nets": nn.ModuleList([inner])}), "nets.0."),
}


@pytest.mark.parametrize("mode", ["auto", "weight"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_model_in_a_container_is_adapted_there(container, mode, tmp_path):
    wrap, prefix = CONTAINERS[container]
    inner, x = mlp(), torch.randn(3, 6)
    model, plain = wrap(inner), copy.deepcopy(inner)
    attached(model, mode=mode)
    assert lk.adapters(model)["default"].weights == (f"{prefix}0.weight", f"{prefix}2.weight")
    y = inner(x)
    assert not torch.equal(y, plain(x))
    with lk.disabled(model):
        assert torch.equal(inner(x), plain(x))
    lk.save(model, tmp_path / "a")
    lk.detach(model)
    lk.load(model, tmp_path / "a")
    assert torch.equal(inner(x), y)


@pytest.mark.parametrize("mode", ["auto", "weight"])
@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_or_part_is_adapted(part, mode):
    torch.compiler.reset()
    inner, x = mlp(), torch.randn(3, 6)
    compiled = torch.compile(inner, backend="eager")
    model = nn.Sequential(compiled) if part else compiled
    before = model(x)
    attached(model, mode=mode)
    y = model(x)
    assert not torch.equal(y, before)
    with lk.disabled(model):
        assert_close(model(x), before)
    with lk.merged(model):
        assert_close(model(x), y)
    lk.detach(model)
    assert_close(model(x), before)
