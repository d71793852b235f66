"""One flat tensor for the optimizer trains what the separate tensors would, and never silently something else."""

import copy
import pickle

import pytest
import torch
from helpers import assert_bits, assert_close, attach, clones, randomize, refused
from kinds import VARIANTS, over_cases
from models import mlp
from torch import Tensor, nn

import lorakit as lk

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def adapted(variant: object = None) -> nn.Module:
    torch.manual_seed(0)
    model = mlp()
    lk.attach(model, variant or lk.LoRA(rank=3))
    randomize(model)
    return model


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(7, 6, generator=generator) for _ in range(count)]


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def pair() -> tuple[nn.Module, list[nn.Parameter], nn.Module, nn.Parameter]:
    """A model that trains its tensors, and a copy that trains the flat one."""
    one = adapted()
    two = copy.deepcopy(one)
    return one, lk.adapter_parameters(one), two, lk.flat_parameter(two)


@over_optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_training_is_that_of_the_separate_tensors_to_the_bit(make, set_to_none, by):
    one, parameters, two, flat = pair()
    first, second = make(parameters), make([flat])
    for i, x in enumerate(batches()):
        backward(one, x)
        backward(two, x)
        if i % 3 == 1:
            continue  # accumulates
        first.step()
        second.step()
        (first if by == "optimizer" else one).zero_grad(set_to_none=set_to_none)
        (second if by == "optimizer" else two).zero_grad(set_to_none=set_to_none)
        if make is OPTIMIZERS["adamw-fused"]:  # its kernel rounds the last few numbers of a tensor otherwise
            for key, value in one.state_dict().items():
                assert_close(two.state_dict()[key], value)
        else:
            assert_bits(two.state_dict(), one.state_dict())


@over_cases
@pytest.mark.parametrize("variant", [VARIANTS[name] for name in ("lora", "pissa", "dora", "vera", "full")])
def test_every_kind_of_layer_trains_as_before(case, variant):
    model, inputs = case.build()
    attach(model, case, variant, inputs)
    randomize(model)
    other = copy.deepcopy(model)
    flat = lk.flat_parameter(other)
    optimizers = torch.optim.AdamW(lk.adapter_parameters(model), lr=0.01), torch.optim.AdamW([flat], lr=0.01)
    for _ in range(3):
        for trained, optimizer in zip((model, other), optimizers, strict=True):
            y = trained(*inputs)
            (y if isinstance(y, Tensor) else y[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for got, wanted in zip(lk.adapter_parameters(other), lk.adapter_parameters(model), strict=True):
        assert_close(got.detach(), wanted.detach())


def test_the_parameters_stay_what_they_are(tmp_path):
    model, x = adapted(), batches()[0]
    y, before = model(x), clones(model.state_dict())
    parameters = lk.adapter_parameters(model)
    flat = lk.flat_parameter(model)
    assert all(a is b for a, b in zip(lk.adapter_parameters(model), parameters, strict=True))
    assert flat.numel() >= sum(p.numel() for p in parameters)
    assert_bits(model.state_dict(), before)
    assert torch.equal(model(x), y)
    for path in (tmp_path / "a", tmp_path / "b.safetensors"):
        lk.save(model, path)
        fresh = mlp()
        fresh.load_state_dict({key: value for key, value in before.items() if "lora" not in key})
        lk.load(fresh, path)
        assert torch.equal(fresh(x), y)
    torch.save(model.state_dict(), tmp_path / "c.pt")
    randomize(model, seed=5)
    model.load_state_dict(torch.load(tmp_path / "c.pt"))  # into the same views
    assert torch.equal(model(x), y)
    backward(model, x)
    assert flat.grad is not None and all(p.grad is not None and p.grad.any() for p in parameters)


def test_gradients_that_were_there_are_taken_along():
    one, parameters, two, _ = pair()
    backward(one, batches()[0])
    flat = lk.flat_parameter(one)
    assert flat.grad is not None
    backward(two, batches()[0])
    for mine, other in zip(parameters, lk.adapter_parameters(two), strict=True):
        assert mine.grad is not None and torch.equal(mine.grad, other.grad)


def test_clipping_reaches_every_gradient():
    one, parameters, two, flat = pair()
    backward(one, batches()[0])
    backward(two, batches()[0])
    total = torch.nn.utils.clip_grad_norm_(parameters, 0.01)
    assert torch.allclose(torch.nn.utils.clip_grad_norm_([flat], 0.01), total)
    for mine, other in zip(lk.adapter_parameters(two), parameters, strict=True):
        assert_close(mine.grad, other.grad)


def test_without_a_gradient_a_step_changes_nothing():
    model = adapted()
    flat = lk.flat_parameter(model)
    optimizer = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.5)
    for clear in (lambda: None, optimizer.zero_grad, model.zero_grad):
        clear()
        before = clones(model.state_dict())
        assert flat.grad is None
        optimizer.step()
        assert_bits(model.state_dict(), before)
        backward(model, batches()[0])
        optimizer.step()


@pytest.mark.parametrize("scale", [2.0**10, 2.0**140])  # the second overflows: the step is skipped
def test_a_gradient_scaler_unscales_or_skips(scale):
    one, parameters, two, flat = pair()
    optimizers = torch.optim.SGD(parameters, lr=0.1), torch.optim.SGD([flat], lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=min(scale, 3e38), growth_interval=1) for _ in optimizers]
    for x in batches():
        for model, optimizer, scaler in zip((one, two), optimizers, scalers, strict=True):
            scaler.scale(model(x).square().mean() * 1e3).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_bits(two.state_dict(), one.state_dict())


def test_a_checkpoint_of_model_and_optimizer_goes_on_to_the_bit():
    model = adapted()
    flat = lk.flat_parameter(model)
    optimizer = torch.optim.AdamW([flat], lr=0.01)

    def train(trained: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
        for x in data:
            backward(trained, x)
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, batches()[:3])
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    train(model, optimizer, batches()[3:])
    other = adapted()
    other.load_state_dict(saved[0])
    again = torch.optim.AdamW([lk.flat_parameter(other)], lr=0.01)
    again.load_state_dict(saved[1])
    train(other, again, batches()[3:])
    assert_bits(other.state_dict(), model.state_dict())


def test_a_tensor_that_a_backward_does_not_reach_counts_as_zero():
    model = adapted()
    flat = lk.flat_parameter(model)
    model[0](batches()[0]).sum().backward()
    reached, _ = flat.grad, model.zero_grad()
    model[0](batches()[0]).sum().backward()  # into fresh tensors
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert flat.grad is reached and reached.any()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and bool(p.grad.any()) == name.startswith("0.")
            assert gradients[name] is None or torch.equal(gradients[name], p.grad)


def test_a_gradient_that_somebody_sets_is_the_one_that_counts():
    model = adapted()
    flat = lk.flat_parameter(model)
    backward(model, batches()[0])
    first, second, *_ = lk.adapter_parameters(model)
    first.grad = torch.ones_like(first)
    second.grad = None
    flat.grad.mul_(3)
    assert torch.equal(first.grad, torch.full_like(first, 3)) and not second.grad.any()
    flat.grad = torch.ones_like(flat)
    assert torch.equal(second.grad, torch.ones_like(second))


def test_one_adapter_of_several_and_all_of_them():
    model = adapted()
    lk.attach(model, lk.LoRA(rank=1), name="b")
    lk.set_trainable(model, "default", True)
    for name in ("b", "default", None):
        flat = lk.flat_parameter(model, name)
        where = flat.untyped_storage().data_ptr()
        inside = {id(p) for p in model.parameters() if p.untyped_storage().data_ptr() == where}
        assert inside == {id(p) for p in lk.adapter_parameters(model, name)}


CHANGES = {
    "moved": lambda model: model.double(),
    "frozen": lambda model: lk.set_trainable(model, "default", False),
    "removed": lambda model: lk.remove(model, "default"),
    "detached": lambda model: lk.detach(model),
    "another flat": lambda model: lk.flat_parameter(model),
    "replaced": lambda model: model.load_state_dict(clones(model.state_dict()), assign=True),
    "again": lambda model: (lk.remove(model, "default"), lk.attach(model, lk.LoRA(rank=3))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("cleared", [None, "optimizer", "model"])
@pytest.mark.parametrize("fused", [False, True])
def test_what_no_longer_trains_here_is_an_error_at_the_next_step(change, cleared, fused):
    if fused and cleared is None:
        return  # steps on gradients that are never cleared, as it would with separate tensors: nothing shows a step
    model = adapted()
    flat = lk.flat_parameter(model)
    optimizer = torch.optim.AdamW([flat], lr=0.1, fused=fused)
    backward(model, batches()[0])
    optimizer.step()
    if cleared is not None:
        (optimizer if cleared == "optimizer" else model).zero_grad()
    change(model)
    x = batches()[1].to(next(model.parameters()).dtype)
    if any(p.requires_grad for p in model.parameters()):
        backward(model, x)
    before = clones(model.state_dict())
    try:
        optimizer.step()
    except lk.LorakitError as error:
        assert "flat_parameter" in str(error)
    else:
        raise AssertionError("it was silent")
    assert_bits(model.state_dict(), before)


def test_refusals_leave_the_model_as_it_was():
    model = adapted()
    lk.set_trainable(model, "default", False)
    with refused(model, "nothing to train"):
        lk.flat_parameter(model)
    lk.attach(model, lk.LoRA(rank=1), name="b")
    lk.set_trainable(model, "default", True)
    lk.adapter_parameters(model, "b")[0].data = lk.adapter_parameters(model, "b")[0].data.double()
    with refused(model, "torch.float64 on cpu"):
        lk.flat_parameter(model)
    with refused(model, "no adapter named 'z'"):
        lk.flat_parameter(model, "z")
    flat = lk.flat_parameter(model, "default")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(lk.LorakitError, match=r"copy the model|save the model"):
            copied(flat)


def test_a_copy_of_the_model_trains_apart():
    model, x = adapted(), batches()[0]
    flat = lk.flat_parameter(model)
    other = copy.deepcopy(model)
    mine = lk.flat_parameter(other)
    before = clones(model.state_dict())
    backward(other, x)
    torch.optim.SGD([mine], lr=0.1).step()
    assert_bits(model.state_dict(), before)
    assert flat.grad is None and mine.grad is not None
