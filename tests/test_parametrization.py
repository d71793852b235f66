"""`LowRankParametrization` with nothing but torch, and the two forms against the dense formula on any shape."""

import copy

import pytest
import torch
from helpers import assert_bits, assert_close, assert_same, clones, picture, scale_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import LORAS, over_loras
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

import lorakit as lk
from lorakit import LoRA, LowRankParametrization


def parametrized(spec: LoRA, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, LowRankParametrization, nn.Linear]:
    """A layer under torch's own register_parametrization, its update with noise in it, and the bare layer."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, dtype=dtype)
    bare = copy.deepcopy(layer)
    update = LowRankParametrization(layer.weight, spec)
    register_parametrization(layer, "weight", update)
    assert torch.equal(layer.weight, bare.weight)
    with torch.no_grad():
        update.A.normal_()
        update.B.normal_()
    return layer, update, bare


@over_loras
def test_the_weight_reads_as_the_sum_when_enabled_and_as_itself_when_not(variant):
    layer, update, bare = parametrized(variant)
    x = torch.randn(3, 7)
    wanted = bare.weight + scale_of(variant) * (update.B @ update.A)
    assert_close(layer.weight, wanted)
    assert_close(layer(x), F.linear(x, wanted, bare.bias))
    update.enabled = False
    assert torch.equal(layer.weight, bare.weight)
    assert torch.equal(layer(x), bare(x))
    update.enabled = True
    assert_close(update(bare.weight, -0.5), bare.weight - 0.5 * scale_of(variant) * (update.B @ update.A))


@over_loras
def test_the_factors_are_all_that_is_new(variant):
    layer, update, bare = parametrized(variant)
    new = [p for p in layer.parameters() if p.shape not in {bare.weight.shape, bare.bias.shape}]
    assert {id(p) for p in new} == {id(update.A), id(update.B)}
    assert sum(p.numel() for p in update.parameters()) == variant.rank * (5 + 7)
    assert (update.A.shape, update.B.shape) == ((variant.rank, 7), (5, variant.rank))
    assert torch.equal(layer.parametrizations.weight.original, bare.weight)


def test_removing_it_merges_or_forgets():
    for keep in (True, False):
        layer, update, bare = parametrized(LoRA(rank=2))
        wanted = bare.weight + update.B @ update.A if keep else bare.weight
        remove_parametrizations(layer, "weight", leave_parametrized=keep)
        assert not is_parametrized(layer)
        assert_close(layer.weight, wanted)


def test_a_weight_without_a_second_axis_is_refused():
    with pytest.raises(lk.LorakitError, match=r"\(4,\)"):
        LowRankParametrization(torch.zeros(4), LoRA(rank=1))


def test_the_layer_it_made_can_itself_be_adapted():
    layer, _, _ = parametrized(LoRA(rank=2))
    model, x = nn.Sequential(layer), torch.randn(3, 7)
    before, y = picture(model), model(x)
    lk.attach(model, LoRA(rank=1), mode="weight")
    assert torch.equal(model(x), y)
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter.fill_(0.1)
    assert_close(model(x), y + F.linear(x, torch.full((5, 7), 0.01)))
    lk.detach(model)
    assert_same(picture(model), before)


@pytest.mark.parametrize("variant", [v for n, v in LORAS.items() if n != "gaussian"], ids=lambda v: v.scaling)
def test_half_precision_is_rounded_once(variant):
    layer, update, bare = parametrized(variant, torch.bfloat16)
    assert update.A.dtype == update.B.dtype == torch.float32
    exact = bare.weight.double() + scale_of(variant) * (update.B.double() @ update.A.double())
    off = (layer.weight.double() - exact).abs()
    assert (off <= exact.abs() * 2**-8 + 1e-5).all()  # half a unit in the last of bfloat16's 8 bits


def test_gradients_of_the_parametrization_are_right_to_the_second_order():
    _, update, bare = parametrized(LoRA(rank=2, alpha=3), torch.float64)
    weight = bare.weight.detach().requires_grad_()

    def read(W, A, B):
        return torch.func.functional_call(update, {"A": A, "B": B}, (W,))

    arguments = (weight, update.A, update.B)
    assert torch.autograd.gradcheck(read, arguments)
    assert torch.autograd.gradgradcheck(read, arguments)


def beside_call(spec: LoRA, d: int, k: int, dtype: torch.dtype = torch.float64):
    """A function of x, A and B: a linear layer with the update beside its call."""
    layer = nn.Linear(k, d, dtype=dtype)
    lk.attach(layer, spec)

    def call(x, A, B):
        names = ("lora.weight.default.A", "lora.weight.default.B")
        return torch.func.functional_call(layer, dict(zip(names, (A, B), strict=True)), (x,))

    return layer, call


def test_gradients_beside_the_call_are_right_to_the_second_order():
    torch.manual_seed(0)
    _, call = beside_call(LoRA(rank=2, alpha=3), 4, 3)
    arguments = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 3), (4, 2)))
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


sizes = st.integers(1, 9)
batches = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(d=sizes, k=sizes, rank=st.integers(1, 6), batch=batches, rslora=st.booleans(), alpha=st.floats(0.1, 20))
@pytest.mark.filterwarnings("ignore:.*is above min:UserWarning")
def test_beside_is_the_dense_formula_on_every_shape(d, k, rank, batch, rslora, alpha):
    torch.manual_seed(d * 100 + k)
    spec = LoRA(rank=rank, alpha=alpha, scaling="rslora" if rslora else "standard")
    layer, call = beside_call(spec, d, k)
    x, A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((*batch, k), (rank, k), (d, rank)))
    got = call(x, A, B)
    weight = layer.weight.detach() + scale_of(spec) * (B @ A)
    wanted = F.linear(x, weight, layer.bias)
    assert_close(got, wanted)
    cotangent = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, (x, A, B), cotangent) for y in (got, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(shape=st.lists(sizes, min_size=2, max_size=4).map(tuple), rank=st.integers(1, 5), strength=st.floats(-3, 3))
def test_a_weight_of_any_number_of_axes_is_the_first_by_all_the_others(shape, rank, strength):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape, dtype=torch.float64)
    spec = LoRA(rank=rank, alpha=2.5)
    update = LowRankParametrization(weight, spec)
    nn.init.normal_(update.B)
    flat = weight.flatten(1) + strength * scale_of(spec) * (update.B @ update.A)
    assert_close(update(weight, strength), flat.view(shape))
    tensors = clones(dict(update.named_parameters()))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "A": (rank, weight[0].numel()),
        "B": (shape[0], rank),
    }


def test_a_state_dict_of_one_layer_under_torch_loads_into_another():
    layer, _, _ = parametrized(LoRA(rank=2))
    other, _, _ = parametrized(LoRA(rank=2))
    nn.init.zeros_(other.parametrizations.weight[0].B)
    other.load_state_dict(layer.state_dict())
    assert_bits(other.state_dict(), layer.state_dict())
