"""How the factors begin: from the weight, from data, orthonormal; and what a start is refused for."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close, assert_same, attached, picture, refused
from models import mlp
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def tensors(model: nn.Module, layer: str = "0", name: str = "default") -> dict[str, torch.Tensor]:
    return dict(model.get_submodule(layer).lora.weight[name].state_dict())


def test_pissa_begins_with_the_largest_singular_directions():
    torch.manual_seed(0)
    model = mlp()
    lk.attach(model, lk.LoRA(rank=2, alpha=6, init="pissa"), "0")
    U, S, Vh = torch.linalg.svd(model[0].weight)
    t = tensors(model)
    assert_close(3 * t["B"] @ t["A"], U[:, :2] * S[:2] @ Vh[:2])
    assert_close(t["A"].norm(dim=1), t["B"].norm(dim=0))


def test_olora_begins_with_the_first_columns_of_q_and_rows_of_r():
    torch.manual_seed(0)
    model = mlp()
    lk.attach(model, lk.LoRA(rank=2, init="olora"), "0")
    t = tensors(model)
    assert_close(t["B"].T @ t["B"], torch.eye(2))
    assert_close(t["B"].T @ model[0].weight, t["A"])


def test_orthogonal_rows():
    model = mlp()
    lk.attach(model, lk.LoRA(rank=3, init="orthogonal"), "0")
    t = tensors(model)
    assert_close(t["A"] @ t["A"].T, torch.eye(3))
    assert not t["B"].any()


@pytest.mark.parametrize("parts", [1, 3])
def test_eva_begins_with_the_principal_directions_of_the_inputs(parts):
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(60, 6) * torch.tensor([5, 1, 4, 1, 1, 3.0]) + 2
    before = picture(model)
    lk.attach(model, lk.LoRA(rank=2, init="eva"), "0", data=[(part,) for part in x.chunk(parts)])
    Vh = torch.linalg.svd(x - x.mean(0))[2]
    A = tensors(model)["A"]
    assert_close((A @ Vh[:2].T).abs(), torch.eye(2), factor=5)
    lk.detach(model)
    assert_same(picture(model), before)


def test_lora_ga_s_first_step_is_the_gradient_s_own_direction():
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(20, 6), torch.randn(20, 4)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    plain = copy.deepcopy(model)
    loss(plain, (x, y)).backward()
    U, _, Vh = torch.linalg.svd(plain[0].weight.grad)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    lk.attach(model, lk.LoRA(rank=2, init="lora-ga"), "0", data=batches, loss=loss)
    t = tensors(model)
    size = 5**0.25 / 4
    assert_close((t["A"] @ Vh[:2].T).abs(), size * torch.eye(2), factor=5)
    assert_close((U[:, 2:4].T @ t["B"]).abs(), size * torch.eye(2), factor=5)
    assert all(p.grad is None for p in model.parameters())


def test_loftq_brings_the_model_nearer_to_the_original_and_leaves_its_base():
    torch.manual_seed(0)
    original, x = mlp(), torch.randn(3, 6)
    rounded = copy.deepcopy(original)
    with torch.no_grad():
        for layer in (rounded[0], rounded[2]):
            layer.weight.copy_((layer.weight * 4).round() / 4)
    base, y = copy.deepcopy(rounded), rounded(x)
    lk.attach(rounded, lk.LoRA(rank=3, init="loftq"), original=original)
    for layer in "02":
        error = original.get_submodule(layer).weight - base.get_submodule(layer).weight
        t = tensors(rounded, layer)
        values = torch.linalg.svdvals(error)
        assert_close((error - t["B"] @ t["A"]).norm(), values[3:].norm())
    with lk.disabled(rounded):
        assert torch.equal(rounded(x), y)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_subtracted_is_saved_as_one_lora_that_peft_reads(init, tmp_path):
    torch.manual_seed(0)
    base, x = mlp(), torch.randn(3, 6)
    for scaling in ("standard", "rslora"):
        model = attached(copy.deepcopy(base), lk.LoRA(rank=2, alpha=3, init=init, scaling=scaling))
        lk.save(model, tmp_path / scaling)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / scaling))
        assert_close(theirs(x), model(x))
        assert theirs.peft_config["default"].r == 4


STARTS = {
    "eva-without-data": ({"init": "eva"}, {}, "data="),
    "eva-no-batch": ({"init": "eva"}, {"data": []}, "no batch"),
    "eva-few": ({"init": "eva", "rank": 3}, {"data": [torch.randn(2, 6)]}, "'0'.*spans 1 directions"),
    "eva-nan": ({"init": "eva"}, {"data": [torch.full((9, 6), torch.nan)]}, "'0'"),
    "ga-without-data": ({"init": "lora-ga"}, {"loss": lambda m, b: m(b).sum()}, "data="),
    "ga-without-loss": ({"init": "lora-ga"}, {"data": [torch.randn(2, 6)]}, "loss="),
    "ga-rank": ({"init": "lora-ga", "rank": 3}, {"data": [torch.randn(2, 6)]}, "rank 2, not 3"),
    "pissa-rank": ({"init": "pissa", "rank": 5}, {}, "5×6|4×5"),
    "loftq-without-original": ({"init": "loftq"}, {}, "original="),
    "data-for-nothing": ({"init": "pissa"}, {"data": [torch.randn(2, 6)]}, "data= has no use"),
    "original-for-nothing": ({}, {"original": nn.Linear(2, 2)}, "original= has no use"),
    "loftq-other": ({"init": "loftq"}, {"original": nn.Linear(2, 2)}, "0.weight"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_without_what_it_needs_is_refused(case):
    spec, more, word = STARTS[case]
    model = mlp()
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=word):
        lk.attach(model, lk.LoRA(**{"rank": 2, **spec}), **more)
    assert_same(picture(model), before)


def test_eva_where_the_layer_is_not_reached_or_takes_no_vectors_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(lk.LorakitError, match=r"'other'.*not called"):
        lk.attach(model, lk.LoRA(rank=1, init="eva"), data=[torch.randn(9, 3)])
    with refused(nn.Conv1d(2, 3, 1), "Conv", "principal directions"):
        lk.attach(nn.Conv1d(2, 3, 1), lk.LoRA(rank=1, init="eva"), nn.Conv1d, data=[torch.randn(1, 2, 5)])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_outputs_and_gradients_are_those_of_peft_which_changes_its_base(init):
    torch.manual_seed(0)
    base, x = mlp(), torch.randn(8, 6)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    lk.attach(base, lk.LoRA(rank=2, init=init))
    pairs = [(base.get_submodule(i).lora.weight.default, theirs.base_model.model.get_submodule(i)) for i in ("0", "2")]
    for mine, peer in pairs:
        A, B = peer.lora_A["default"].weight, peer.lora_B["default"].weight
        assert_close(mine.B @ mine.A, B @ A)
        with torch.no_grad():  # singular vectors are so but for their signs; then a step of training
            for ours, start, factor in ((mine.A, mine.A0, A), (mine.B, mine.B0, B)):
                start.copy_(factor)
                ours.copy_(factor.add_(torch.randn_like(factor) * 0.3))
    y, wanted = base(x), theirs(x)
    assert_close(y, wanted)
    for output in (y, wanted):
        output.square().sum().backward()
    for mine, peer in pairs:
        assert_close(mine.A.grad, peer.lora_A["default"].weight.grad)
        assert_close(mine.B.grad, peer.lora_B["default"].weight.grad)
