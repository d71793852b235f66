"""Rows with adapters of their own, all products batched: every arrangement, and factors that change meanwhile."""

import copy

import pytest
import torch
from helpers import assert_close, attached, randomize
from torch import nn

import lorakit as lk

ARRANGEMENTS = {
    "one each": ["a", "b", "c"],
    "sorted": ["a", "a", "b", "b", "c", "c"],
    "in turns": ["a", "b", "c", "a", "b", "c"],
    "other order": ["c", "c", "a", "a"],
    "with the base": ["a", None, "b", None, "c"],
    "unequal": ["a", "a", "b", "c", "a", "b"],
    "very unequal": ["a"] * 9 + ["b"],
    "one": ["b", "b", "b"],
}
over_arrangements = pytest.mark.parametrize("rows", ARRANGEMENTS.values(), ids=ARRANGEMENTS)


def several(dtype=torch.float64, dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    attached(model, lk.LoRA(rank=2, alpha=3, dropout=dropout), name="a", seed=1)
    attached(model, lk.LoRA(rank=3, dropout=dropout), name="b", seed=2)
    attached(model, lk.LoRAFA(rank=2, dropout=dropout), name="c", seed=3)
    for name in "abc":
        lk.set_trainable(model, name, True)
    return model.eval()


def one_by_one(model, x, rows):
    """Every row with its own adapter, one after the other."""
    parts = []
    for i, name in enumerate(rows):
        with lk.active(model, [name] if name else []):
            parts.append(model(x[i : i + 1]))
    return torch.cat(parts)


@over_arrangements
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)], ids=["vectors", "sequences", "grids"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_each_row_is_as_if_alone(rows, shape, contiguous):
    model = several()
    x = torch.randn(len(rows), *shape, 6, dtype=torch.float64)
    x = x if contiguous else torch.randn(6, *shape, len(rows), dtype=torch.float64).transpose(0, -1)
    other, same = copy.deepcopy(model), x.clone().requires_grad_()
    wanted = one_by_one(other, same, rows)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    leaf = x.detach().requires_grad_()
    with lk.per_row(model, rows):
        y = model(leaf)
        with torch.no_grad():
            for _ in range(3):  # factors are kept from the second call on
                assert_close(model(x), wanted)
    y.backward(cotangent)
    assert_close(y, wanted)
    assert_close(leaf.grad, same.grad)
    for mine, theirs in zip(lk.adapter_parameters(model), lk.adapter_parameters(other), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert_close(mine.grad, theirs.grad)


@over_arrangements
def test_second_derivatives(rows):
    model = several()
    x = torch.randn(len(rows), 2, 6, dtype=torch.float64, requires_grad=True)
    used = [p for name in dict.fromkeys(filter(None, rows)) for p in lk.adapter_parameters(model, name)]

    def function(x, *factors):
        return model(x)

    with lk.per_row(model, rows):
        assert torch.autograd.gradgradcheck(function, (x, *used))


def frozen(model):
    for name in "abc":
        lk.set_trainable(model, name, False)
    return model


def in_place(model):
    randomize(model, "a", seed=7)


def assigned(model):
    state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model):
    update = model[0].lora.weight["a"]
    update.A = nn.Parameter(torch.randn_like(update.A), requires_grad=False)


def pointed_elsewhere(model):
    for parameter in lk.adapter_parameters(model, "a"):
        parameter.data = torch.randn_like(parameter)


def switched_off(model):
    model[0].lora.weight["b"].enabled = False


def cast(model):
    model.to(torch.float32).to(torch.float64)
    in_place(model)


def trained(model):
    lk.set_trainable(model, "a", True)
    optimizer = torch.optim.SGD(lk.adapter_parameters(model, "a"), lr=1.0)
    with torch.enable_grad():
        model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


CHANGES = [in_place, assigned, replaced, pointed_elsewhere, switched_off, cast, trained]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_inside_the_block_counts(change):
    model, rows = frozen(several()), ["a", "b", "c"]
    x = torch.randn(3, 6, dtype=torch.float64)
    with lk.per_row(model, rows):
        for _ in range(3):
            before = model(x)
        change(model)
        after = model(x)
    assert not torch.equal(after, before)
    assert_close(after, one_by_one(model, x, rows))


@torch.no_grad()
def test_no_stack_outlives_its_block_or_goes_with_a_copy():
    model, x = frozen(several()), torch.randn(3, 6, dtype=torch.float64)
    selection = model[0].lora.weight.selection
    with lk.per_row(model, ["a", "b", "c"]):
        y = model(x)
        choice = selection.rows
        assert not choice.stacks  # it may be the only call
        assert torch.equal(model(x), y)
        assert set(choice.stacks) == {0, 1}
        other = copy.deepcopy(model)
        assert not other[0].lora.weight.selection.rows.stacks
        assert_close(other(x), y)
    assert selection.rows is None


def test_dropout_is_each_adapters_own():
    model, rows = several(dropout=0.5), ["a", "b", "c"]
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad(), lk.per_row(model, rows):
        still = model(x)
        assert torch.equal(model(x), still)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), still)
