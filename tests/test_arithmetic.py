"""Arithmetic on adapters as values: against the dense formula."""

import copy

import pytest
import torch
from helpers import attached, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mlp
from test_combine import over_thin
from values import adapter, adapters, assert_near, dense, total

import lorakit as lk
from lorakit.algebra.blend import dropped, elected, trimmed
from lorakit.header import WeightEntry
from lorakit.values.adapter import weighted_sum
from lorakit.values.arithmetic import dare, resize, ties
from lorakit.values.weight import AdapterWeight

few = settings(max_examples=40, deadline=None)
factors = st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-3)


@few
@given(adapters)
def test_weight_one_is_the_identity(a):
    same = weighted_sum({a: 1.0})
    assert same.header == a.header
    for key, tensor in a.state_dict().items():
        assert same.state_dict()[key] is tensor


@few
@given(adapters, adapters, factors, factors)
def test_sums_are_linear_in_the_update(a, b, s, t):
    got = weighted_sum({a: s, b: t}) if a is not b else weighted_sum({a: s})
    floor = 1e-6 * max(delta.norm() for one in (a, b) for delta in dense(one).values())
    wanted = total([(a, s), (b, t)])
    assert_near(dense(got), {name: wanted[name] for name in dense(got)}, floor=floor * (abs(s) + abs(t)))
    assert all(float(wanted[name].norm()) == 0 for name in wanted.keys() - dense(got).keys())


@few
@given(adapters, adapters)
def test_operators_are_what_they_say(a, b):
    floor = 1e-5
    assert_near(dense(a + b), total([(a, 1), (b, 1)]), floor=floor)
    assert_near(dense(a - b), total([(a, 1), (b, -1)]), floor=floor)
    assert_near(dense(-a), total([(a, -1)]))
    assert_near(dense(a * 0.25 + b * 0.75), total([(a, 0.25), (b, 0.75)]), floor=floor)
    assert_near(dense(a + 0.3 * (b - a)), total([(a, 0.7), (b, 0.3)]), floor=floor)


@few
@given(adapters)
def test_an_adapter_and_its_negative_cancel(a):
    scale = max(delta.norm() for delta in dense(a).values())
    for nothing in (a - a, a + -a, a + -1 * a):
        assert all(delta.norm() <= 1e-6 * scale for delta in dense(nothing).values())
    assert all(not values.any() for values in lk.spectrum(a - a).values())


@few
@given(adapters, st.integers(1, 8))
def test_resizing_leaves_out_the_smallest_singular_values(a, rank):
    small, report = resize(a, rank=rank)
    wanted = dense(a)
    for row in report.weights:
        sigma = torch.linalg.svdvals(wanted[row.name])
        squares = sigma.square().reshape(-1, sigma.shape[-1]).sum(0)
        lost = squares[row.rank :].sum().sqrt()
        assert row.rank <= rank and row.norm == pytest.approx(squares.sum().sqrt().item(), rel=1e-6)
        assert row.error * row.norm == pytest.approx(lost.item(), rel=1e-5, abs=1e-5 * row.norm)
        left = (dense(small)[row.name] - wanted[row.name]).norm().item()
        assert left == pytest.approx(lost.item(), abs=2e-6 * row.norm)
    everything = torch.cat([delta.flatten() for delta in wanted.values()]).norm().item()
    rest = torch.cat([(dense(small)[name] - delta).flatten() for name, delta in wanted.items()]).norm().item()
    assert report.error == pytest.approx(rest / everything, abs=3e-6)


@few
@given(adapters)
def test_resizing_to_full_rank_keeps_the_tensors(a):
    for bounds in ({"rank": 100}, {"error": 0.0}, {"energy": 1.0}):
        same, report = resize(a, **bounds)
        assert_near(dense(same), dense(a), floor=1e-6 * max(d.norm() for d in dense(a).values()))
        assert report.error < 1e-6
        if "rank" in bounds and all(row.whole <= min(row.size[-2:]) for row in report.weights):
            assert all(same.state_dict()[key] is tensor for key, tensor in a.state_dict().items())


@few
@given(adapters, st.floats(0.05, 1), st.floats(0, 0.9))
def test_bounds_are_kept_by_the_smallest_rank(a, energy, error):
    wanted = dense(a)
    by_energy, by_error = resize(a, energy=energy)[1], resize(a, error=error)[1]
    for row, other in zip(by_energy.weights, by_error.weights, strict=True):
        assert 1 - row.error**2 >= energy - 1e-9 and other.error <= error + 1e-9
        sigma = torch.linalg.svdvals(wanted[row.name]).square().reshape(-1, min(row.size[-2:])).sum(0)
        if row.rank > 1:
            assert sigma[: row.rank - 1].sum() / sigma.sum() < energy + 1e-6
        if other.rank > 1:
            assert (sigma[other.rank - 1 :].sum() / sigma.sum()).sqrt() > error - 1e-6


def test_sums_of_many_ranks_have_no_more_than_the_matrix():
    many = weighted_sum({adapter(seed, {"linear": 4, "experts": 4}): 0.5 for seed in range(5)})
    assert [each.variant.rank for each in many.weights] == [5, 5]
    assert_near(dense(many), total([(adapter(seed, {"linear": 4, "experts": 4}), 0.5) for seed in range(5)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_added_in_thirty_two(dtype):
    a, b = (adapter(seed, {"linear": 2}, dtype=dtype) for seed in (1, 2))
    got = weighted_sum({a: 0.7, b: -0.3})
    assert {tensor.dtype for tensor in got.state_dict().values()} == {torch.float32}
    assert_near(dense(got), total([(a, 0.7), (b, -0.3)]))


@over_thin
def test_values_are_what_the_live_model_combines(variant, tmp_path):
    base = mlp()
    model = attached(copy.deepcopy(base), variant, targets=["0", "2"], name="a")
    attached(model, lk.LoRA(1, alpha=2), targets=["0"], name="b", seed=5)
    x = torch.randn(3, 6)
    lk.combine(model, {"a": 0.5, "b": -2.0}, "both")
    y = model(x)
    if isinstance(variant, lk.VeRA):
        with pytest.raises(lk.LorakitError, match="VeRA"):
            0.5 * lk.adapter_value(model, "a")
        return
    value = 0.5 * lk.adapter_value(model, "a") - 2 * lk.adapter_value(model, "b")
    lk.load(model, value, name="value")
    assert torch.allclose(model(x), y, atol=1e-5)
    lk.write(value, tmp_path / "v")
    fresh = copy.deepcopy(base)
    lk.load(fresh, tmp_path / "v")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["Parameter", None])
def test_a_stack_of_as_many_matrices_as_rows_is_no_kernel(kind):
    entry = WeightEntry("w", "stack", None, (3, 3, 4), None, None, kind=kind)
    stack = AdapterWeight(entry, lk.LoRA(1), {"A": torch.randn(3, 1, 4), "B": torch.randn(3, 3, 1)})
    assert stack.stacked and stack.product()[0].shape == (3, 3, 1)
    kernel = AdapterWeight(entry, lk.LoRA(3), {"A": torch.randn(3, 2, 5), "B": torch.randn(3, 3, 1)})
    assert kernel.stacked == (kind is not None)


def test_a_padding_that_is_no_column_is_refused():
    words = adapter(1, {"words": 2})
    for padding in (9, -10, 10**9):
        entry = words.weights[0].entry._replace(padding_idx=padding)
        with pytest.raises(lk.LorakitError, match="padding_idx"):
            2 * words.with_weights([words.weights[0]._replace(entry=entry)])


def test_what_has_no_sum_is_all_named():
    a, b = adapter(1, {"linear": 2, "words": 1}), adapter(2, {"linear": 2})
    other = b.with_weights([b.weights[0]._replace(entry=b.weights[0].entry._replace(shape=(7, 6)))])
    with pytest.raises(lk.LorakitError, match="shape"):
        a + other
    dora = lk.adapter_value(attached(mlp(), lk.DoRA(2)))
    whole = lk.adapter_value(attached(mlp(), train_also=["2"], targets=["0"]))
    for bad in (dora, whole):
        with pytest.raises(lk.LorakitError) as caught:
            2 * bad
        assert "'0.weight'" in str(caught.value) or "'2.weight'" in str(caught.value)
    assert weighted_sum({whole: 1.0}).header == whole.header
    for terms, words in (({}, "nothing"), ({a: float("nan")}, "finite"), ({a: "1"}, "finite"), ({a: True}, "finite")):
        with pytest.raises(lk.LorakitError, match=words):
            weighted_sum(terms)
    for factor in ("2", None):
        with pytest.raises(TypeError):
            a * factor
    with pytest.raises(TypeError):
        a + 1


def test_adapters_of_two_bases_have_no_sum():
    a = lk.adapter_value(attached(mlp(), targets=["0"]))
    other = mlp()
    torch.nn.init.normal_(other[0].weight)
    with pytest.raises(lk.LorakitError, match="different bases"):
        a + lk.adapter_value(attached(other, targets=["0"]))


@pytest.mark.parametrize("bounds", [{"rank": 0}, {"rank": 1.5}, {"energy": 2}, {"error": -1}, {"rank": True}])
def test_bounds_out_of_range_are_refused(bounds):
    with pytest.raises(lk.LorakitError):
        resize(adapter(1, {"linear": 2}), **bounds)


def test_trim_elect_and_merge_by_hand():
    W = torch.tensor([[4.0, -1.0], [0.5, -3.0]])
    assert torch.equal(trimmed(W, 0.5), torch.tensor([[4.0, 0.0], [0.0, -3.0]]))
    assert torch.equal(trimmed(W, 1.0), W)
    others = [torch.tensor([[1.0, -2.0, 0.0, 5.0]]), torch.tensor([[3.0, 1.0, 0.0, -5.0]])]
    assert torch.equal(elected(others), torch.tensor([[2.0, -2.0, 0.0, 0.0]]))


def test_dropping_is_right_in_the_mean():
    W, generator = torch.randn(50, 40), torch.Generator().manual_seed(0)
    mean = torch.stack([dropped(W, 0.3, generator) for _ in range(400)]).mean(0)
    assert (mean - W).norm() / W.norm() < 0.1
    assert torch.equal(dropped(W, 1.0, generator), W)


@few
@given(adapters, st.integers(0, 5))
def test_keeping_everything_of_one_is_the_adapter(a, seed):
    for merged in (ties({a: 1.0}, density=1.0, rank=100), dare({a: 1.0}, density=1.0, seed=seed, rank=100)):
        assert_near(dense(merged[0]), dense(a), floor=1e-5)
        assert merged[1].error < 1e-6


def test_ties_and_dare_are_those_of_the_dense_updates():
    a, b = adapter(1, {"linear": 3, "experts": 2}), adapter(2, {"linear": 2})
    x, y = dense(a)["linear.weight"] * 0.5, dense(b)["linear.weight"] * 2
    merged, report = ties({a: 0.5, b: 2.0}, density=0.4, rank=5)
    assert_near({"w": dense(merged)["linear.weight"]}, {"w": elected([trimmed(x, 0.4), trimmed(y, 0.4)])}, floor=1e-5)
    small, report = ties({a: 0.5, b: 2.0}, density=0.4, rank=2)
    lost = (dense(small)["linear.weight"] - dense(merged)["linear.weight"]).norm()
    assert report.weights[0].error * report.weights[0].norm == pytest.approx(lost.item(), rel=1e-4)
    again = [dare({a: 0.5, b: 2.0}, density=0.5, seed=3, rank=5)[0] for _ in range(2)]
    assert_near(dense(again[0]), dense(again[1]), share=0.0)
    with pytest.raises(lk.LorakitError, match="rank="):
        ties({a: 1.0})
    for seed in (-1, 2**40, 1.5, "x"):
        with pytest.raises(lk.LorakitError, match="seed"):
            dare({a: 1.0}, seed=seed, rank=1)
    for density in (0, 1.5, True, "x"):
        with pytest.raises(lk.LorakitError, match="density"):
            dare({a: 1.0}, density=density, rank=1)


def test_a_sum_on_a_model_does_what_it_says():
    model = attached(attached(mlp(), name="a", targets=["0"]), name="b", targets=["0", "2"], seed=7)
    merged, _ = ties({lk.adapter_value(model, "a"): 1.0, lk.adapter_value(model, "b"): 1.0}, rank=3)
    lk.load(model, merged, name="ties")
    assert lk.adapters(model)["ties"].strength == 1.0
    with refused(model, "already"):
        lk.load(model, merged, name="ties")
