"""The fast update: right in every order of its products, to the second derivative, and keeping no more than it must."""

import copy
import itertools

import pytest
import torch
from helpers import KeptForBackward, assert_close, attached, randomize
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.layers import thin

ROWS, INPUTS, OUTPUTS, RANK = 5, 4, 3, 2


@pytest.fixture(params=[1, 128], ids=["many-rows", "few-rows"])
def many(request, monkeypatch):
    monkeypatch.setattr(thin, "MANY", request.param)


def tensors(*trained: str, dtype: torch.dtype = torch.float64):
    """x, W, b, A and B, of which those named want a gradient."""
    torch.manual_seed(0)
    shapes = {
        "x": (2, ROWS, INPUTS),
        "W": (OUTPUTS, INPUTS),
        "b": (OUTPUTS,),
        "A": (RANK, INPUTS),
        "B": (OUTPUTS, RANK),
    }
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_(name in trained) for name, tensor in made.items()}


SOME = [names for count in (1, 2, 3) for names in itertools.combinations("xAB", count)]
over_trained = pytest.mark.parametrize("trained", [*SOME, ("x", "W", "A"), ("b", "B")], ids="".join)


@over_trained
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_first_and_second_derivatives(trained, dropout, scale, many):
    made = tensors(*trained)

    def together(*values):
        torch.manual_seed(5)  # the same entries are dropped at each evaluation
        now = dict(made, **dict(zip(trained, values, strict=True)))
        return thin.adapted_linear(now["x"], now["W"], now["b"], (now["A"], now["B"], scale, dropout))

    def beside(*values):
        torch.manual_seed(5)
        now = dict(made, **dict(zip(trained, values, strict=True)))
        y = F.linear(now["x"], now["W"], now["b"])
        return thin.add_thin_product(y, now["x"], (now["A"], now["B"], scale, dropout))

    values = [made[name] for name in trained]
    assert torch.equal(together(*values), beside(*values))
    for function in (together, beside):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_same_whatever_trains(dtype, many):
    outputs = []
    for trained in [(), *SOME]:
        made = tensors(*trained, dtype=torch.float32)
        x, W, b = (made[name].detach().to(dtype) for name in "xWb")
        x = x.requires_grad_("x" in trained)
        outputs.append(thin.adapted_linear(x, W, b, (made["A"], made["B"], 2.0, 0.0)))
    for y in outputs:
        assert y.dtype == dtype
        assert torch.equal(y, outputs[0])


def test_few_and_many_rows_agree(monkeypatch):
    model = attached(nn.Sequential(nn.Linear(6, 5)), lk.LoRA(rank=3, alpha=5))
    x = torch.randn(7, 6, requires_grad=True)
    found = []
    for many in (1, 128):
        monkeypatch.setattr(thin, "MANY", many)
        y = model(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *lk.adapter_parameters(model)])))
    for few, lots in zip(*found, strict=True):
        assert_close(few, lots)


N, K, D, R = 200, 64, 48, 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", [lk.LoRA, lk.LoRAFA])
@pytest.mark.parametrize("rows", [N, 10])
def test_nothing_is_kept_but_the_input_and_its_image_of_rank_r(dtype, dropout, variant, rows):
    model = nn.Sequential(nn.Linear(K, D)).to(dtype)
    attached(model, variant(rank=R, dropout=dropout))
    x = torch.randn(rows, K, dtype=dtype, requires_grad=True)
    with KeptForBackward(model) as kept:
        y = model(x)
    inputs = 0 if variant is lk.LoRAFA else rows * K * dtype.itemsize
    assert kept.bytes == inputs + rows * R * 4
    y.sum().backward()


def test_dropout_drops_its_share_and_draws_anew():
    model = nn.Sequential(nn.Linear(400, 30, bias=False))
    nn.init.zeros_(model[0].weight)
    attached(model, lk.LoRA(rank=2, dropout=0.25))
    model.train()
    with torch.no_grad():
        parameters = dict(zip("AB", lk.adapter_parameters(model), strict=True))
        parameters["A"].fill_(1.0)
        parameters["B"].fill_(0.5)
    x = torch.ones(300, 400)
    y, again = model(x), model(x)
    assert not torch.equal(y, again)
    # Each output is the number of entries kept, over 1 - p.
    kept = y[:, 0] * 0.75
    assert_close(kept, kept.round(), factor=100)
    assert abs(kept.mean().item() - 300) < 3
    assert 50 < kept.var().item() < 110  # 400·p·(1 − p) = 75
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), y)
    model.eval()
    assert_close(model(x), torch.full_like(y, 400.0))


def test_dropout_whatever_the_default_device_is():
    model = attached(nn.Sequential(nn.Linear(6, 5)), lk.LoRA(rank=2, dropout=0.5)).train()
    x = torch.randn(3, 6)
    with torch.device("meta"):
        lk.activate(model, {"default": 0.37})
        assert model(x).isfinite().all()
    assert torch.compile(model, backend="eager")(x).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_entries_again(reentrant):
    torch.manual_seed(0)
    model = attached(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 8)), lk.LoRA(rank=2, dropout=0.5)).train()
    x = torch.randn(150, 20, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append([x.grad.clone(), *(p.grad.clone() for p in lk.adapter_parameters(model))])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_a_base_that_trains_too_gets_its_gradient(many):
    model = nn.Sequential(nn.Linear(6, 5)).double()
    plain = copy.deepcopy(model)
    attached(model)
    model[0].weight.requires_grad_()
    model[0].bias.requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64)
    cotangent = torch.randn(4, 5, dtype=torch.float64)
    model(x).backward(cotangent)
    plain(x).backward(cotangent)
    assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert_close(model[0].bias.grad, plain[0].bias.grad)


def test_a_forward_that_is_called_directly_is_adapted():
    model = attached(nn.Sequential(nn.Linear(6, 5)))
    x = torch.randn(3, 6)
    assert torch.equal(model[0].forward(x), model(x))
    assert torch.equal(model[0].forward(input=x), model(x))
    with lk.disabled(model):
        assert not torch.equal(model[0].forward(x), model[0].lora.weight["default"](model[0].weight) @ x[0])


def test_a_forward_that_was_replaced_later_is_not_lost_in_silence():
    model = attached(nn.Sequential(nn.Linear(6, 5)))
    ours, x = model[0].forward, torch.randn(3, 6)
    y = model(x)
    model[0].forward = lambda x: ours(x) + 1
    assert torch.equal(model(x), y + 1)
    for verb in (lk.detach, lambda model: lk.attach(model, lk.LoRA(rank=1), name="second")):
        with pytest.raises(lk.LorakitError, match="forward was replaced"):
            verb(model)
    model[0].forward = ours
    lk.detach(model)
    assert "forward" not in vars(model[0])


def test_a_weight_that_is_computed_since_is_used():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    attached(model)
    with lk.disabled(model):
        base = model(x)
    update = model(x) - base
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    with lk.disabled(model):
        doubled = model(x)
    assert_close(doubled - model[0].bias, 2 * (base - model[0].bias))
    assert_close(model(x), doubled + update)


def test_parts_and_copies_find_their_updates_by_name_until_a_verb_is_called():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5)), torch.randn(3, 6)
    for name in "ab":
        attached(model, name=name, seed=ord(name))
    lk.activate(model, {"a": 0.5})
    part, whole = copy.deepcopy(model[0]), copy.deepcopy(model)
    assert torch.equal(part(x), model[0](x))
    assert torch.equal(whole(x), model(x))
    lk.activate(whole, "b")
    lk.activate(model, "b")
    assert torch.equal(whole(x), model(x))
    assert not torch.equal(part(x), model[0](x))
    randomize(whole, "b", seed=9)
    assert not torch.equal(whole(x), model(x))
    assert len(list(part.modules())) == len(list(model[0].modules()))


def test_adapters_come_and_go_without_leaving_places_behind():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5))
    attached(model, targets="0", name="stays")
    selection = model[0].lora.weight.selection
    for i in range(5):
        attached(model, targets="2", name=f"goes{i}", seed=i)
        assert max(map(len, selection.tables.values())) == 2
        lk.remove(model, f"goes{i}")
    assert list(selection.tables) == ["stays"]
