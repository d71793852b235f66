"""A new kind and a new variant, from the outside, by the page that says how: each one file, and all laws hold."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    clones,
    dense,
    factor_key,
    picture,
    randomize,
    run,
    weights_of,
)
from kinds import CASES, VARIANTS
from oracles import from_matrix
from torch import nn

import lorakit as lk
from lorakit.layers.kind import _kinds
from lorakit.variants import variant as registry

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FILES = {
    re.match(r"# (\w+)\.py", code).group(1): code
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The page's files as modules of somebody else's project."""
    for name, code in FILES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {name: importlib.import_module(name) for name in FILES}
    yield modules
    for name in FILES:
        del sys.modules[name]
    del registry.VARIANTS["Bounded"]
    _kinds.register(modules["gained"].Gained, lambda layer: None)


def test_each_is_one_file_of_under_sixty_lines():
    assert set(FILES) == {"gained", "gained_kind", "bounded"}
    for name, code in FILES.items():
        assert len(code.splitlines()) < 60, name


def check_laws(model, inputs, tmp_path, variant, **how):
    """Attach, disable, merge, save, load, probe and detach, against a plain model with W + ΔW."""
    before, y, fresh = picture(model), run(model, inputs), copy.deepcopy(model)
    base = clones(model.state_dict())
    lk.attach(model, variant, **how)
    assert_close(run(model, inputs), y)
    randomize(model)
    adapted = run(model, inputs)
    assert not torch.equal(adapted, y)
    assert_close(adapted, run(dense(fresh, changes(model)), inputs))
    assert lk.probe(model, *inputs).ok
    adapted.sum().backward()
    assert all(p.grad is not None for p in lk.adapter_parameters(model))
    state = model.state_dict()
    assert_bits({key: state[key] for key in base}, base)
    with lk.disabled(model):
        assert_close(run(model, inputs), y)
    with lk.merged(model):
        assert_close(run(model, inputs), adapted)
    lk.save(model, tmp_path / "a")
    lk.load(fresh, tmp_path / "a", trainable=True)
    assert torch.equal(run(fresh, inputs), adapted)
    lk.detach(model)
    assert_same(picture(model), before)


def changes(model):
    """ΔW of every adapted weight as the update itself gives it."""
    return {
        name: layer.lora[own].default.delta_weight(layer._parameters[own])
        for name in weights_of(model)
        for layer, own in [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])]
    }


@pytest.mark.parametrize("mode", ["auto", "weight"])
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.needs])
def test_the_new_kind_works_with_every_variant(outside, name, mode, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(outside["gained"].Gained(6, 5), nn.ReLU(), nn.Linear(5, 3))
    how = {"mode": mode}
    plan = lk.plan(model, VARIANTS[name], **how)
    assert [row.kind for row in plan.rows] == ["Gained", "Linear"]
    assert plan.rows[0].applied == ("beside" if mode == "auto" else "in the weight")
    check_laws(model, (torch.randn(4, 6),), tmp_path, VARIANTS[name], **how)
    with torch.no_grad():
        lk.attach(model, lk.LoRA(rank=2, alpha=6), "0", mode=mode)
        randomize(model)
        x, layer = torch.randn(4, 6), model[0]
        A, B = lk.adapter_parameters(model)
        weight = layer._parameters["weight"]
        assert_close(layer(x), x @ (weight + 3 * (B @ A).T) * layer.gain)


@pytest.mark.parametrize("mode", ["auto", "weight"])
@pytest.mark.parametrize("case", [case for case in CASES if case.mode == "auto"], ids=lambda case: case.name)
def test_the_new_variant_works_on_every_kind(outside, case, mode, tmp_path):
    model, inputs = case.build()
    bounded = outside["bounded"].Bounded(rank=2, limit=0.3)
    check_laws(model, inputs, tmp_path, bounded, targets=case.targets, mode=mode)
    lk.attach(model, bounded, targets=case.targets, mode=mode)
    randomize(model)
    for name, change in changes(model).items():
        A, B = (model.state_dict()[factor_key(name, "default", tensor)] for tensor in "AB")
        assert_close(change, from_matrix(case.build()[0], name, 0.3 * torch.tanh(B @ A)).view(change.shape))


def test_their_errors_name_what_is_wrong(outside):
    with pytest.raises(lk.LorakitError, match="rank=0"):
        outside["bounded"].Bounded(rank=0)
