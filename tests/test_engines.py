"""Law 8, eager half: copies, pickles, autocast, checkpointing, functional calls, moves between dtypes and devices."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    attached,
    clones,
    dense_lora,
    factors_of,
    picture,
    randomize,
    run,
    run_everywhere,
)
from kinds import CASES, over_cases
from models import mlp
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lorakit as lk

over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch-save": torch_saved}


@pytest.mark.parametrize("kind", COPIES)
@over_cases
def test_a_copy_is_equal_and_lives_on_its_own(case, kind):
    model, inputs = case.build()
    base = run_everywhere(model, inputs)
    attached(model, **case.how, name="a")
    attached(model, **case.how, name="b", seed=2)
    lk.activate(model, {"a": 0.5, "b": 2.0})
    outputs, seen = run_everywhere(model, inputs), picture(model)
    other = COPIES[kind](model)
    assert_bits(run_everywhere(other, inputs), outputs)
    assert lk.adapters(other) == lk.adapters(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    randomize(other, seed=7)
    lk.activate(other, "a")
    assert_same(picture(model), seen)
    with lk.merged(other):
        pass
    lk.detach(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in case.build()[0].modules()]
    assert_bits(run_everywhere(other, inputs), base)
    assert_bits(run_everywhere(model, inputs), outputs)


@over_cases
def test_autocast_computes_as_the_dense_formula_does(case):
    model, inputs = case.build()
    plain = copy.deepcopy(model)
    attached(model, **case.how)
    wanted = dense_lora(plain, factors_of(model), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_wanted = run(model, inputs), run(wanted, inputs)
    assert y.dtype == y_wanted.dtype
    assert_close(y, y_wanted, torch.bfloat16)
    y.float().square().sum().backward()
    for parameter in lk.adapter_parameters(model):
        assert parameter.grad.dtype == parameter.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@over_cases
def test_gradient_checkpointing_gives_the_same_gradients(case, reentrant):
    model, inputs = case.build()
    attached(model, **case.how)
    gradients = []
    needs_gradient = torch.zeros(1, requires_grad=True)  # reentrant checkpointing asks for one

    def checkpointed(*x):
        return checkpoint(lambda _, *x: model(*x), needs_gradient, *x, use_reentrant=reentrant)

    for call in (model, checkpointed):
        model.zero_grad()
        x = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        run(call, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in lk.adapter_parameters(model)])
    for got, wanted in zip(*gradients, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("case", [c for c in CASES if c.functional], ids=lambda case: case.name)
def test_functional_call_and_grad_take_the_adapter_as_arguments(case):
    model, inputs = case.build()
    attached(model, **case.how)
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        output = functional_call(model, parameters, inputs)
        return (output if isinstance(output, torch.Tensor) else output[0]).square().sum()

    gradients = torch.func.grad(loss)(mine)
    run(model, inputs).square().sum().backward()
    parameters = dict(model.named_parameters())
    for name, gradient in gradients.items():
        assert_close(gradient, parameters[name].grad)
    off = {name: torch.zeros_like(p) for name, p in mine.items()}
    with lk.disabled(model):
        base = run(model, inputs).square().sum()
    assert_close(loss(off), base)


@pytest.mark.parametrize("case", [c for c in CASES if c.functional and c.batches], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_a_stack_of_adapters(case):
    model, inputs = case.build()
    attached(model, **case.how)
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stack = {name: torch.stack([p, -2 * p, 0 * p]) for name, p in mine.items()}
    got = torch.func.vmap(lambda p: functional_call(model, p, inputs), randomness="same")(stack)
    for i in range(3):
        model.load_state_dict({name: p[i] for name, p in stack.items()}, strict=False)
        assert_close(got[i], run(model, inputs))


@pytest.mark.parametrize("case", [case for case in CASES if case.twice], ids=lambda case: case.name)
def test_second_derivatives_are_those_of_the_dense_formula(case):
    model, inputs = case.build(torch.float64)
    plain = copy.deepcopy(model)
    attached(model, **case.how)
    mine = lk.adapter_parameters(model)
    factors = {w: (A.requires_grad_(), B.requires_grad_()) for w, (A, B) in factors_of(model).items()}
    leaves = [tensor for pair in factors.values() for tensor in pair]
    seconds = []
    for net, parameters in ((model, mine), (dense_lora(plain, factors, 1.0), leaves)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = run(net, inputs).pow(3).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    for got, wanted in zip(*seconds, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over_cases
def test_half_precision_models_keep_their_adapters_in_float32(case, dtype):
    model, inputs = case.build(dtype)
    plain = copy.deepcopy(model)
    attached(model, **case.how)
    assert {p.dtype for p in lk.adapter_parameters(model)} == {torch.float32}
    y = run(model, inputs)
    assert y.dtype == dtype
    assert_close(y, run(dense_lora(plain, factors_of(model), 1.0), inputs))


@over_cases
def test_moving_to_another_dtype_takes_the_adapter_along(case):
    model, inputs = case.build()
    attached(model, **case.how)
    y = run(model, inputs)
    model.double()
    wide = run(model, tuple(x.double() if x.is_floating_point() else x for x in inputs))
    assert wide.dtype == torch.float64
    assert_close(wide.float(), y)
    model.float()
    assert torch.equal(run(model, inputs), y)
    model.to(torch.bfloat16)
    low = run(model, tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs))
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), y, torch.bfloat16)


@over_cases
def test_meta_models_can_be_planned_attached_and_run(case):
    model, inputs = case.build()
    checkpoint_ = clones(attached(copy.deepcopy(model), **case.how).state_dict())
    model.to("meta")
    lk.attach(model, lk.LoRA(rank=2), **case.how)
    assert {p.device.type for p in lk.adapter_parameters(model)} == {"meta"}
    assert run(model, tuple(x.to("meta") for x in inputs)).is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(checkpoint_, strict=True)
    real = attached(case.build()[0], **case.how)
    assert torch.equal(run(model, inputs), run(real, inputs))


@over_cases
def test_an_adapter_moves_to_meta_with_its_model(case):
    model, inputs = case.build()
    attached(model, **case.how)
    model.to("meta")
    assert {p.device.type for p in lk.adapter_parameters(model)} == {"meta"}
    assert run(model, tuple(x.to("meta") for x in inputs)).is_meta


@over_modes
def test_threads_read_one_model_at_once(mode):
    model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
    y, wrong = model(x).detach(), []

    def read():
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@over_modes
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives(mode):
    model, x = attached(mlp().double(), mode=mode), torch.randn(3, 6, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(model, (x,), (tangent,))
    wanted = torch.func.vmap(lambda row, t: torch.func.jacrev(model)(row) @ t)(x, tangent)
    assert_close(got, wanted)
