"""Where a claim about a variant once failed; each test is the smallest case of it."""

import copy
import math

import pytest
import torch
from helpers import randomize
from torch import nn

import lorakit as lk


@pytest.mark.parametrize("variant", [lk.LoRA(rank=2), lk.LoRA(rank=2, init="pissa"), lk.DoRA(rank=2)], ids=str)
def test_inputs_that_are_not_contiguous_change_no_bit(variant, tmp_path):
    """Of such inputs torch takes one kernel or another by whether the factor requires a gradient."""
    model = nn.Sequential(nn.Linear(24, 20)).requires_grad_(False)
    fresh, x = copy.deepcopy(model), torch.randn(7, 4, 24).transpose(0, 1)
    before = model(x)
    lk.attach(model, variant)
    assert torch.equal(model(x), before)
    randomize(model)
    lk.save(model, tmp_path / "a")
    lk.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_start_leaves_no_rank_that_could_never_train(init):
    """A layer that begins at zero, or that was left out of quantization, gives singular values of zero."""
    model = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    given = {"original": copy.deepcopy(model)} if init == "loftq" else {}
    x = torch.randn(5, 8)
    before = model(x)
    lk.attach(model, lk.LoRA(rank=2, init=init), **given)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    B = model[0].lora["weight"]["default"].B
    assert (B.grad.abs().amax(0) > 0).all()


def test_the_norms_of_dora_hold_in_a_model_cast_to_16_bits():
    """A square above 65504 is infinity in float16, which made the rows zero."""
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    model[0].weight.mul_(600)
    lk.attach(model, lk.DoRA(rank=2))
    model.half()
    x = torch.randn(4, 64).half()
    with lk.disabled(model):
        base = model(x)
    assert torch.allclose(model(x), base, rtol=5e-3, atol=1)


def test_a_budget_takes_an_expert_that_had_no_input():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    lk.attach(model, lk.AdaLoRA(rank=2), targets=["0", "1"])
    budget = lk.RankBudget(model, target=1, steps=4)
    with pytest.raises(lk.LorakitError, match="backward"):
        budget.step()
    for _ in range(4):
        model[0](torch.randn(2, 4)).square().sum().backward()
        budget.step()


def test_a_budget_forgets_a_gradient_that_overflowed():
    """A GradScaler skips such a step; in the running means it would stay for ever."""
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, lk.AdaLoRA(rank=4))
    budget = lk.RankBudget(model, target=2, steps=10, warmup=5)
    update, scales = model[0].lora["weight"]["default"], torch.tensor([[0.0], [1.0], [2.0], [0.0]])
    for step in range(10):
        nn.init.constant_(update.E, 1)
        for parameter in update.parameters():
            parameter.grad = torch.full_like(parameter, math.inf if step == 0 else 0.0)
        if step > 0:
            update.E.grad = scales * step
        budget.step()
    assert update.E.flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "variant", [lk.LoRA(rank=2, init="pissa"), lk.LoRA(rank=2, init="olora"), lk.DoRA(rank=2), lk.Full()], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_begins_as_the_weight_is_refused_where_that_is_not_finite(variant, value):
    """It would change the output, and PiSSA ended in an error of torch's that names no layer."""
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = value
    with pytest.raises(lk.LorakitError, match=r"'0'.*NaN or infinity"):
        lk.attach(model, variant)
    assert not lk.adapters(model)


def test_dora_refuses_norms_that_overflow():
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    model[0].weight.mul_(1e25)
    with pytest.raises(lk.LorakitError, match=r"'0'.*norm"):
        lk.attach(model, lk.DoRA(rank=2))


@pytest.mark.parametrize("variant", [lk.VeRA(rank=3), lk.Rows((0, 2))], ids=str)
def test_a_checkpoint_brings_a_model_from_meta(variant):
    """What no file holds has to follow the tensors that are assigned."""
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, variant)
    randomize(model)
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


class _TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_eva_sees_the_inputs_of_a_model_that_was_compiled_and_run():
    """Compiled code looks for no new hooks."""
    model, x = _TwoLayers().requires_grad_(False), torch.randn(9, 6)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager", fullgraph=True)
    compiled(x)
    for each in (model, compiled):
        lk.attach(each, lk.LoRA(rank=2, init="eva"), data=[x])
    assert torch.equal(compiled.b.lora["weight"]["default"].A, model.b.lora["weight"]["default"].A)
    randomize(model)
    randomize(compiled)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_a_budget_of_no_rank_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lk.attach(model, lk.AdaLoRA(rank=2))
    with pytest.raises(lk.LorakitError, match="no rank"):
        lk.RankBudget(model, target=0.1, steps=10)


@pytest.mark.parametrize("other", [lk.LoRA(rank=2), lk.LoHa(rank=2), lk.Full()], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv1d(6, 8, 3, padding=1, groups=2)], ids=str)
def test_dora_beside_the_call_rescales_the_base_alone(layer, other):
    """What another adapter adds in the same weight is in the layer's output, and is none of its affair."""
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(2, 6, 6)
    lk.attach(model, other, "0", mode="weight", name="other")
    lk.attach(model, lk.DoRA(rank=2), "0", mode="beside", name="dora")
    randomize(model)
    lk.activate(model, {"other": 0.7, "dora": -1.3})
    y = model(x)
    with lk.merged(model):
        assert torch.allclose(model(x), y, atol=1e-5)


def test_the_rounding_of_many_rows_does_not_depend_on_what_trains():
    model, x = nn.Sequential(nn.Linear(9, 7)).requires_grad_(False), torch.randn(200, 9)
    before = model(x)
    lk.attach(model, lk.LoRA(rank=5, init="pissa"))
    assert torch.equal(model(x), before)
    randomize(model)
    y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    lk.set_trainable(model, "default", False)
    assert torch.equal(model(x), y)
