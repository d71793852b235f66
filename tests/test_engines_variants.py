"""Law 8 for every variant, on kinds of each sort: copies, autocast, checkpointing, one graph, export, checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_bits, assert_close, attach, dense, randomize, run
from kinds import CASES, VARIANTS, refusal
from oracles import dense_updates
from torch.utils.checkpoint import checkpoint

import lorakit as lk

SORTS = ["linear", "linear-weight", "conv2d-groups", "embedding-padding", "parameter-3d"]
over = pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        if case.name in SORTS
        for name in VARIANTS
        if refusal(case, name) is None
    ],
)


def built(case, name):
    """The adapted model, its inputs, and the bare one."""
    model, inputs = case.build()
    plain = copy.deepcopy(model)
    attach(model, case, VARIANTS[name], inputs)
    randomize(model)
    return model, inputs, plain


def gradients(model, y):
    model.zero_grad()
    y.float().square().sum().backward()
    return [p.grad.clone() for p in lk.adapter_parameters(model)]


@over
def test_copies_are_equal_and_live_on_their_own(case, name):
    model, inputs, _ = built(case, name)
    y = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.deepcopy(model).to("cpu", torch.float64).to(torch.float32),
    ):
        assert torch.equal(run(other, inputs), y)
        assert lk.adapters(other) == lk.adapters(model)
        randomize(other, seed=9)
        assert torch.equal(run(model, inputs), y)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(empty, inputs), y)


@over
def test_autocast_computes_as_the_dense_formula_does(case, name):
    model, inputs, plain = built(case, name)
    formula = dense(plain, dense_updates(plain, model, VARIANTS[name])[1])
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = run(model, inputs), run(formula, inputs)
    assert y.dtype == wanted.dtype
    assert_close(y, wanted, torch.bfloat16)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, y))


@over
def test_checkpointing_gives_the_same_gradients(case, name):
    model, inputs, _ = built(case, name)
    wanted = gradients(model, run(model, inputs))
    for reentrant in (True, False):
        start = torch.zeros(1, requires_grad=True)  # reentrant checkpointing asks for one
        y = checkpoint(lambda _, *x: run(model, x), start, *inputs, use_reentrant=reentrant)
        for got, gradient in zip(gradients(model, y), wanted, strict=True):
            assert_close(got, gradient)


@over
def test_one_graph_gives_the_eager_outputs_and_gradients(case, name):
    model, inputs, _ = built(case, name)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    y, eager = run(fast, inputs), run(model, inputs)
    assert_close(y, eager)
    for got, wanted in zip(gradients(model, y), gradients(model, eager), strict=True):
        assert_close(got, wanted)


@over
def test_exported_programs_have_the_adapter_in_them(case, name):
    model, inputs, _ = built(case, name)
    y = run(model.eval(), inputs)
    program = torch.export.export(model, inputs)
    assert_close(run(program.module(), inputs), y)


@over
def test_strengths_scale_the_update_and_merge_alike(case, name):
    model, inputs, plain = built(case, name)
    updates = dense_updates(plain, model, VARIANTS[name])[1]
    for strength in (0.5, -1.5):
        formula = dense(plain, {key: strength * update.detach() for key, update in updates.items()})
        lk.activate(model, {"default": strength})
        assert_close(run(model, inputs), run(formula, inputs), factor=3)
        with lk.merged(model):
            assert_close(run(model, inputs), run(formula, inputs), factor=3)


@over
def test_checkpoints_of_the_base_and_of_all_load_strictly(case, name):
    model, inputs, plain = built(case, name)
    y, state = run(model, inputs), copy.deepcopy(model.state_dict())
    randomize(model, seed=4)
    model.load_state_dict(state, strict=True)
    assert torch.equal(run(model, inputs), y)
    before = {key: tensor.clone() for key, tensor in lk.adapter_state_dict(model).items()}
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_bits(lk.adapter_state_dict(model), before)
    assert torch.equal(run(model, inputs), y)
