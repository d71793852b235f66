"""One adapter for each row of a batch: every row as if it were computed alone, in outputs and in gradients."""

import copy

import pytest
import torch
from helpers import assert_close, attach, attached, randomize, refused, run
from kinds import CASES, VARIANTS, refusal
from models import mlp
from torch import nn

import lorakit as lk

NAMES = ["a", None, "b", "a", "c"]
BESIDE = [
    case
    for case in CASES
    if {row.applied for row in lk.plan(case.build()[0], lk.LoRA(rank=1), **case.how).rows} == {"beside"}
    and case.name not in ("conv1d-unbatched", "bag-sum", "encoder")
]
over_beside = pytest.mark.parametrize("case", BESIDE, ids=lambda case: case.name)


def batch(case) -> tuple[torch.Tensor, ...]:
    """The case's inputs, of five rows."""
    torch.manual_seed(3)
    rows = [case.build(seed=seed)[1] for seed in range(5)]
    return tuple(torch.cat([row[i][:1] for row in rows]) for i in range(len(rows[0])))


def several(case, seed: int = 0) -> nn.Module:
    """Adapters a, b and c of three variants."""
    model, inputs = case.build(seed=seed)
    for name, variant in zip("abc", ("lora", "dora", "loha"), strict=True):
        attach(model, case, VARIANTS[variant], inputs, name=name)
        randomize(model, name, seed=ord(name))
        lk.set_trainable(model, name, True)
    for name in "abc":
        lk.set_trainable(model, name, True)
    return model


def row_of(inputs, i):
    return tuple(x[i : i + 1] for x in inputs)


@over_beside
def test_each_row_is_as_if_alone_and_its_gradient_reaches_its_own_adapter(case):
    model, inputs = several(case), batch(case)
    other = copy.deepcopy(model)
    with lk.per_row(model, NAMES):
        y = run(model, inputs)
        y.square().sum().backward()
    for i, name in enumerate(NAMES):
        with lk.active(other, [name] if name else []):
            wanted = run(other, row_of(inputs, i))
            if name:
                wanted.square().sum().backward()
        assert_close(y[i : i + 1], wanted)
    for mine, theirs in zip(lk.adapter_parameters(model), lk.adapter_parameters(other), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert_close(mine.grad, theirs.grad, factor=3)


@over_beside
def test_rows_of_the_base_alone_are_the_base_to_the_bit(case):
    model, inputs = several(case), batch(case)
    with lk.disabled(model):
        base = run(model, inputs)
    with lk.per_row(model, [None] * 5):
        assert torch.equal(run(model, inputs), base)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_by_row(name):
    case = CASES[0]
    assert refusal(case, name) is None
    model, inputs = case.build()
    attach(model, case, VARIANTS[name], inputs)
    randomize(model)
    x = batch(case)
    y = run(model, x)
    with lk.disabled(model):
        base = run(model, x)
    with lk.per_row(model, [None, "default", None, "default", "default"]):
        assert_close(run(model, x), torch.stack([base[0], y[1], base[2], y[3], y[4]]))


def test_the_choice_from_before_is_back_and_inner_choices_count():
    model, x = several(CASES[0]), batch(CASES[0])[0]
    lk.activate(model, {"a": 0.5})
    y = model(x)
    with lk.per_row(model, NAMES):
        rows = model(x)
        with lk.disabled(model):
            base = model(x)
        with lk.active(model, "a"):
            a = model(x)
        assert torch.equal(model(x), rows)
        assert lk.probe(model, x, name="b").ok
        with pytest.raises(KeyError), lk.per_row(model, ["a"] * 5):
            assert_close(model(x), a)
            raise KeyError
        assert torch.equal(model(x), rows)
    assert torch.equal(model(x), y)
    assert torch.equal(rows[1], base[1])
    assert_close(rows[0], a[0])
    with lk.per_row(model, NAMES):
        lk.remove(model, "a")
        assert torch.equal(model(x), base)


def test_adapters_of_other_layers_and_ranks_share_a_batch():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 6)
    attached(model, lk.LoRA(rank=1), targets="0", name="first")
    attached(model, lk.LoRA(rank=3), targets="2", name="last")
    with lk.per_row(model, ["first", "last", None]):
        y = model(x)
    for i, choice in enumerate(["first", "last", []]):
        with lk.active(model, choice):
            assert_close(y[i], model(x[i]))


def test_bags_of_a_flat_list():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(7, 6, mode="sum")
    attached(model, targets=nn.EmbeddingBag, name="a")
    x, offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 2])  # as many indices as bags
    with lk.active(model, "a"):
        y = model(x, offsets)
    with lk.disabled(model):
        base = model(x, offsets)
    with lk.per_row(model, ["a", None, "a"]):
        assert_close(model(x, offsets), torch.stack([y[0], base[1], y[2]]))


BAD = {
    "text": ("a", "no choice"),
    "empty": ([], "no choice"),
    "number": ([1], "1 is no name"),
    "unknown": (["a", "z"], "'z'"),
    "none": (None, "no choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_make_no_sense_are_refused(case):
    model = several(CASES[0])
    rows, word = BAD[case]
    with refused(model, word), lk.per_row(model, rows):
        pass


def test_what_rows_cannot_be_told_of_is_refused():
    model, x = several(CASES[0]), torch.randn(3, 6)
    with lk.per_row(model, ["a", "b"]), pytest.raises(lk.LorakitError, match=r"Linear returned \(3, 5\).*2 rows"):
        model(x)
    with lk.per_row(model, ["a"] * 5), pytest.raises(lk.LorakitError, match=r"Linear returned \(5,\)"):
        model(torch.randn(6))
    attached(model, targets="0", mode="weight", name="read")
    with refused(model, "'read'", "0.weight", "all rows share"), lk.per_row(model, ["a", "read"]):
        pass
    conv = nn.Sequential(nn.Conv1d(3, 3, 3))
    attached(conv, targets="0")
    with lk.per_row(conv, ["default"] * 3), pytest.raises(lk.LorakitError, match="Conv1d"):
        conv(torch.randn(3, 7))


def test_compiled_in_one_graph():
    model, x = several(CASES[0]), batch(CASES[0])[0]
    with lk.per_row(model, NAMES):
        y = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
