"""Attempts to break the laws: odd inputs, odd layers, odd moments."""

import copy

import pytest
import torch
from helpers import assert_close, assert_same, attached, dense_lora, factors_of, picture, randomize, refused
from models import mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lorakit as lk

INPUTS = {
    "one-axis": lambda: torch.randn(6),
    "empty": lambda: torch.randn(0, 6),
    "empty-middle": lambda: torch.randn(2, 0, 6),
    "four-axes": lambda: torch.randn(2, 1, 3, 6),
    "expanded": lambda: torch.randn(6).expand(4, 6),
    "transposed": lambda: torch.randn(6, 3, 2).transpose(0, 2),
    "strided": lambda: torch.randn(8, 12)[::2, ::2],
    "many-rows": lambda: torch.randn(3, 70, 6),
}
over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])


@over_modes
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_shape(kind, mode):
    torch.manual_seed(0)
    plain, x = mlp(), INPUTS[kind]()
    model = attached(copy.deepcopy(plain), mode=mode)
    wanted = dense_lora(plain, factors_of(model), 1.0)
    assert_close(model(x), wanted(x))
    assert_close(model[0](input=x), wanted[0](x))
    with torch.inference_mode():
        assert_close(model(x), wanted(x))
    factors = factors_of(model)
    leaves = [factor.requires_grad_() for pair in factors.values() for factor in pair]
    dense_lora(plain, factors, 1.0)(x).sum().backward()
    model(x).sum().backward()
    for parameter, leaf in zip(lk.adapter_parameters(model), leaves, strict=True):
        assert_close(parameter.grad, leaf.grad)


@over_modes
def test_nan_in_one_row_stays_in_that_row(mode):
    model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
    x[1, 2] = torch.nan
    assert model(x).isnan().all(1).tolist() == [False, True, False]


def test_an_activation_that_works_in_place_sees_the_adapted_output():
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True)), torch.randn(3, 6)
    model = attached(copy.deepcopy(plain))
    y = model(x)
    assert_close(y, dense_lora(plain, factors_of(model), 1.0)(x))
    y.sum().backward()


@over_modes
def test_hooks_of_the_user_see_the_adapted_layer_and_outlive_it(mode):
    model, x, seen = mlp(), torch.randn(3, 6), []
    model[0].register_forward_hook(lambda layer, args, y: seen.append(y))
    model[0].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    attached(model, mode=mode)
    model[0].register_forward_hook(lambda layer, args, y: seen.append(y))
    model(x)
    assert torch.equal(seen[0], seen[1])
    with lk.merged(model):
        model(x)
    assert_close(seen[2], seen[0])
    lk.detach(model)
    assert len(model[0]._forward_hooks) == 2
    model(x)
    assert not torch.equal(seen[-1], seen[0])


class Doubled(nn.Linear):
    """A linear layer by its class, another function by its forward."""

    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


@over_modes
def test_a_subclass_with_a_forward_of_its_own_gets_the_update_in_its_weight(mode):
    torch.manual_seed(0)
    plain, x = nn.Sequential(Doubled(6, 5)), torch.randn(3, 6)
    model = attached(copy.deepcopy(plain), mode=mode)
    y = dense_lora(plain, factors_of(model), 1.0)(x)
    with lk.merged(model):
        assert_close(model(x), y)
    assert_close(model(x), y)


REPARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
}


@over_modes
@pytest.mark.parametrize("kind", REPARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_layers_that_compute_their_weight_work_or_are_refused(kind, mode):
    torch.manual_seed(0)
    model = nn.Sequential(REPARAMETRIZED[kind](nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(3, 6)
    y = model(x).detach()
    before = picture(model)
    try:
        lk.attach(model, lk.LoRA(rank=2), mode=mode)
    except lk.LorakitError:
        assert_same(picture(model), before)
        return
    assert_close(model(x), y)
    randomize(model)
    adapted = model(x)
    B, A = (dict(model.named_parameters())[f"0.lora.weight.default.{t}"] for t in "BA")
    with lk.disabled(model):
        weight = model[0].weight.detach().clone()
        assert_close(model(x), y)
    hidden = F.linear(x, weight + B @ A, model[0].bias).relu()
    assert_close(adapted, model[2](hidden))
    assert_close(copy.deepcopy(model)(x), adapted)
    with pytest.raises(lk.LorakitError, match="computed"), lk.merged(model):
        pass
    with pytest.raises(lk.LorakitError, match="computed"):
        lk.merge(model)
    assert_close(model(x), adapted)
    lk.detach(model)
    assert_close(model(x), y)


def test_a_part_and_its_whole_cannot_both_have_adapters_of_their_own():
    model = nn.Sequential(mlp(), nn.Linear(4, 3))
    lk.attach(model[0], lk.LoRA(rank=2), name="part")
    assert list(lk.adapters(model)) == ["part"]
    with refused(model, "part"):
        lk.attach(model, lk.LoRA(rank=2), name="whole")
    lk.detach(model)
    lk.attach(model, lk.LoRA(rank=2), name="whole")
    for part in (model[0], model[0][0]):
        with refused(model, "part of a model"):
            lk.attach(part, lk.LoRA(rank=2), name="part")
        with refused(model, "part of a model"):
            lk.detach(part)


def test_two_adapted_parts_are_told_apart():
    model = nn.Sequential(attached(mlp(), name="left"), attached(mlp(), name="right"))
    with refused(model, "'0'", "'1'"):
        lk.activate(model, "left")
    lk.detach(model[0])
    assert list(lk.adapters(model)) == ["right"]


@over_modes
def test_a_copied_part_keeps_what_it_did(mode):
    model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
    part = copy.deepcopy(model[0])
    y = model[0](x)
    lk.activate(model, [])
    assert torch.equal(part(x), y)


def test_a_layer_whose_class_was_changed_is_refused_and_nothing_else_is_touched():
    model, x = attached(mlp(), mode="weight", targets="2"), torch.randn(3, 6)
    attached(model, targets="0", name="beside")
    lk.activate(model, ["default", "beside"])
    cls = type(model[2])
    model[2].__class__ = type("Changed", (cls,), {})
    y = model(x)
    verbs = {
        "merged": lambda: lk.merged(model).__enter__(),
        "merge": lambda: lk.merge(model),
        "detach": lambda: lk.detach(model),
        "attach": lambda: lk.attach(model, lk.LoRA(rank=2), name="third"),
        "remove": lambda: lk.remove(model, "default"),
    }
    for name, verb in verbs.items():
        with refused(model, "Changed"):
            verb()
        assert torch.equal(model(x), y), name
    model[2].__class__ = cls
    lk.detach(model)
    assert type(model[2]) is nn.Linear


@over_modes
def test_an_error_half_way_through_attaching_is_undone(mode, monkeypatch):
    from lorakit import change

    model = mlp()
    add_one, calls = change._add_one, []

    def failing(addition, *rest):
        calls.append(addition)
        if len(calls) == 2:
            raise RuntimeError("half way")
        add_one(addition, *rest)

    before = picture(model)
    monkeypatch.setattr(change, "_add_one", failing)
    with pytest.raises(RuntimeError, match="half way"):
        lk.attach(model, lk.LoRA(rank=2), mode=mode)
    assert len(calls) >= 2
    assert_same(picture(model), before)


class Delegating(nn.Module):
    """Hands on every attribute that it does not have, as many wrappers do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


@over_modes
def test_a_module_that_delegates_attributes(mode):
    model, x = Delegating(), torch.randn(3, 6)
    before = picture(model)
    y = attached(model, mode=mode)(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    lk.detach(model)
    assert_same(picture(model), before)


def test_the_surroundings_do_not_leak_into_the_adapter():
    model, x = mlp(), torch.randn(3, 6)
    with torch.device("meta"), torch.no_grad():
        lk.attach(model, lk.LoRA(rank=2))
    assert {(p.dtype, p.device.type) for p in lk.adapter_parameters(model)} == {(torch.float32, "cpu")}
    model(x).sum().backward()
    before, default = lk.adapter_parameters(model), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        lk.attach(model, lk.LoRA(rank=2), name="second")
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in lk.adapter_parameters(model, "second")} == {before[0].dtype}


@over_modes
def test_the_seed_decides_what_attaching_draws(mode):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = mlp()
        lk.attach(model, lk.LoRA(rank=2), mode=mode)
        drawn.append(lk.adapter_parameters(model)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_acts_on_the_adapter_in_training_alone():
    torch.manual_seed(0)
    plain, x = mlp(), torch.randn(3, 6)
    model = attached(copy.deepcopy(plain), lk.LoRA(rank=2, dropout=0.5))
    assert_close(model.eval()(x), dense_lora(plain, factors_of(model), 1.0)(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with lk.disabled(model):
        assert torch.equal(model(x), plain(x))
