"""Combining adapters as values: ΔW of the sum is the sum of ΔW, and what a bound on the rank leaves out is known."""

import copy

import pytest
import torch
from helpers import assert_bits, assert_close, attach, attached, clones, randomize, refused, run, run_everywhere
from kinds import CASES, over_cases, over_dtypes
from models import Experts, SelfAttention, mlp
from torch import Tensor, nn

import lorakit as lk
from lorakit.algebra.low_rank import concatenate, recompress, singular_values
from lorakit.layers import outline
from lorakit.state import sites

THIN = {
    "lora": lk.LoRA(rank=2, alpha=5),
    "rslora": lk.LoRA(rank=1, alpha=4, scaling="rslora"),
    "pissa": lk.LoRA(rank=2, alpha=3, init="pissa"),
    "lora-fa": lk.LoRAFA(rank=2, alpha=3),
    "vera": lk.VeRA(rank=2),
    "adalora": lk.AdaLoRA(rank=2, alpha=3),
}
"""Variants whose ΔW is a product of two thin factors."""
over_thin = pytest.mark.parametrize("variant", THIN.values(), ids=THIN)


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW of every weight as a matrix, in 64 bits, from the formula of the variant itself."""
    with torch.no_grad():
        return {
            site.name: kind.matrix_of(update.delta_weight(outline(site.layer, kind)).double())
            for site in sites(model, name)
            for update in [copy.deepcopy(site.adapted[name]).double()]
            for kind in [update.kind]
        }


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-6) -> None:
    assert list(got) == list(wanted)
    for key in wanted:
        assert (got[key] - wanted[key]).norm() <= share * wanted[key].norm() + 1e-12, key


@over_cases
@over_thin
def test_weight_one_of_one_adapter_is_the_identity(case, variant):
    model, inputs = case.build()
    attach(model, case, variant, inputs, name="a")
    randomize(model)
    y = run_everywhere(model, inputs)
    report = lk.combine(model, "a", name="b")
    assert_near(deltas(model, "b"), deltas(model, "a"))
    assert all(row.error < 1e-12 for row in report.weights)
    assert str(report)
    for regime, combined in run_everywhere(model, inputs).items():
        assert_close(combined, y[regime], factor=2 * case.rounding)


@over_cases
def test_the_sum_is_linear_and_acts_as_the_adapters_together_do(case):
    model, inputs = case.build()
    for i, name in enumerate("abc"):
        attach(model, case, list(THIN.values())[i], inputs, name=name)
        randomize(model, name, seed=i)
    weights = {"a": 0.7, "b": -0.3, "c": 1.5}
    lk.activate(model, weights)
    y = run_everywhere(model, inputs)
    before = {name: clones(lk.adapter_state_dict(model, name)) for name in "abc"}
    lk.combine(model, weights, name="mix")
    parts = {name: deltas(model, name) for name in "abc"}
    wanted = {key: sum(weight * parts[name][key] for name, weight in weights.items()) for key in parts["a"]}
    assert_near(deltas(model, "mix"), wanted)
    assert lk.adapters(model)["mix"].strength == 1
    for regime, combined in run_everywhere(model, inputs).items():
        assert_close(combined, y[regime], factor=4 * case.rounding)
    for name in "abc":
        assert_bits(lk.adapter_state_dict(model, name), before[name])


@over_cases
@pytest.mark.parametrize("rank", [1, 2])
def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_known(case, rank):
    model, inputs = case.build()
    for i, name in enumerate("ab"):
        attach(model, case, lk.LoRA(rank=2), inputs, name=name)
        randomize(model, name, seed=i)
    lk.combine(model, {"a": 1.0, "b": 0.5}, name="exact")
    report = lk.combine(model, {"a": 1.0, "b": 0.5}, name="small", rank=rank)
    exact, small = deltas(model, "exact"), deltas(model, "small")
    for row in report.weights:
        W = exact[row.name]
        left = torch.linalg.svdvals(W)[..., row.rank :]
        assert row.rank == rank
        assert float((small[row.name] - W).norm() / W.norm()) == pytest.approx(row.error, abs=1e-6)
        assert float(left.norm() / W.norm()) == pytest.approx(row.error, abs=1e-6)


@over_dtypes
def test_dtypes(dtype):
    model = mlp().to(dtype)
    for i, name in enumerate("ab"):
        attached(model, name=name, seed=i)
    lk.combine(model, {"a": 1.0, "b": 1.0}, name="c", rank=3)
    held = {p.dtype for p in lk.adapter_parameters(model, "c")}
    assert held == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_an_adapter_and_its_negative_cancel():
    model, x = mlp(), torch.randn(3, 6)
    y = model(x)
    attached(model, name="a")
    lk.combine(model, {"a": -1.0}, name="minus")
    report = lk.combine(model, {"a": 1.0, "minus": 1.0}, name="nothing", error=0.01)
    assert [(row.rank, row.error) for row in report.weights] == [(1, 0.0), (1, 0.0)]
    assert torch.equal(model(x), y)
    lk.set_trainable(model, "nothing", True)
    model(x).sum().backward()
    assert any(bool(p.grad.any()) for p in lk.adapter_parameters(model, "nothing"))  # it is not dead


def test_what_an_adapter_does_not_adapt_counts_as_zero():
    model, x = mlp(), torch.randn(3, 6)
    attached(model, name="a", targets="0", seed=1)
    attached(model, name="b", targets="2", seed=2)
    lk.activate(model, {"a": 1.0, "b": 0.5})
    y = model(x)
    report = lk.combine(model, {"a": 1.0, "b": 0.5}, name="c")
    assert [(row.name, row.rank) for row in report.weights] == [("0.weight", 2), ("2.weight", 2)]
    assert_close(model(x), y)


def test_ranks_that_differ_by_weight_are_kept_saved_and_loaded(tmp_path):
    model, x = mlp(), torch.randn(3, 6)
    fresh = copy.deepcopy(model)
    attached(model, name="a", ranks={"0": 1})
    attached(model, name="b", targets="2", seed=2)
    report = lk.combine(model, {"a": 0.5, "b": 2.0}, name="c")
    assert [row.rank for row in report.weights] == [1, 4]
    assert report.parameters == lk.adapters(model)["c"].parameters
    lk.save(model, tmp_path / "c", name="c")
    lk.load(fresh, tmp_path / "c", name="c")
    assert torch.equal(fresh(x), model(x))
    lk.save(model, tmp_path / "c.safetensors", name="c")
    lk.load(fresh, tmp_path / "c.safetensors", name="again")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("conv2d-groups", "attention", "parameter-3d", "bag-sum")]
)
def test_other_kinds_are_saved_and_merged_too(case, tmp_path):
    model, inputs = case.build()
    fresh = copy.deepcopy(model)
    for name in "ab":
        attach(model, case, lk.LoRA(rank=1), inputs, name=name)
        randomize(model, name, seed=ord(name))
    lk.combine(model, ["a", "b"], name="c")
    y = run(model, inputs)
    lk.save(model, tmp_path, name="c")
    lk.load(fresh, tmp_path)
    assert torch.equal(run(fresh, inputs), y)
    with lk.merged(model, "c"):
        assert_close(run(model, inputs), y)


def test_more_ranks_than_a_matrix_has_are_folded():
    model = Experts()  # matrices of 6×5
    for name in "ab":
        attached(model, lk.LoRA(rank=4), name=name, targets="weight", seed=ord(name))
    (row,) = lk.combine(model, ["a", "b"], name="c").weights
    assert (row.whole, row.rank) == (8, 5)
    assert row.error < 1e-12
    wanted = {key: a + deltas(model, "b")[key] for key, a in deltas(model, "a").items()}
    assert_near(deltas(model, "c"), wanted)


@pytest.mark.parametrize("bound", [{"energy": 0.9}, {"error": 0.3}])
def test_a_bound_on_what_is_lost_takes_the_smallest_rank_that_holds_it(bound):
    model = attached(mlp(), lk.LoRA(rank=4), name="a")
    report = lk.combine(model, "a", name="b", **bound)
    for row in report.weights:
        values = torch.linalg.svdvals(deltas(model, "a")[row.name]).square()
        allowed = bound.get("error", 0) ** 2 or 1 - bound["energy"]
        wanted = next(r for r in range(len(values)) if values[r:].sum() <= allowed * values.sum())
        assert row.rank == wanted


def test_a_combination_is_trained_on_if_asked():
    model = attached(mlp(), name="a")
    lk.combine(model, "a", name="b")
    assert not any(p.requires_grad for p in lk.adapter_parameters(model, "b"))
    lk.combine(model, "a", name="c", trainable=True)
    assert {name: a.trainable for name, a in lk.adapters(model).items()} == {"a": False, "b": False, "c": True}
    with torch.no_grad():
        lk.adapter_parameters(model, "c")[0].add_(1)  # its tensors are its own
    assert_near(deltas(model, "b"), deltas(model, "a"))


def test_a_combination_in_inference_mode_can_be_trained():
    model = attached(mlp(), name="a")
    with torch.inference_mode():
        lk.combine(model, "a", name="b", trainable=True)
    model(torch.randn(3, 6)).sum().backward()


def test_what_is_no_product_of_two_factors_is_refused_all_of_it_at_once():
    model = attached(mlp(), name="a")
    for name, variant in {"d": lk.DoRA(rank=1), "h": lk.LoHa(rank=1), "k": lk.LoKr(rank=1), "f": lk.Full()}.items():
        lk.attach(model, variant, name=name)
    with refused(model, "'d'", "'0.weight'", "'2.weight'", "DoRA rescales", "LoHa", "LoKr", "Full"):
        lk.combine(model, ["a", "d", "h", "k", "f"], name="x")


def test_refusals_leave_the_model_as_it_was():
    model = attached(mlp(), name="a")
    for words, arguments in {
        "'z'": {"choice": "z", "name": "x"},
        "already resident": {"choice": "a", "name": "a"},
        "nothing to combine": {"choice": {}, "name": "x"},
        "finite number": {"choice": {"a": float("nan")}, "name": "x"},
        "rank=0": {"choice": "a", "name": "x", "rank": 0},
        "energy=2": {"choice": "a", "name": "x", "energy": 2},
        "error=-1": {"choice": "a", "name": "x", "error": -1},
        "may not hold": {"choice": "a", "name": "x.y"},
    }.items():
        with refused(model, words):
            lk.combine(model, **arguments)
    with torch.no_grad():
        lk.adapter_parameters(model, "a")[0][0, 0] = torch.nan
    with refused(model, "'a' at '0.weight'", "NaN"):
        lk.combine(model, "a", name="x", rank=1)


def test_one_weight_seen_in_two_ways_is_refused():
    model = SelfAttention()
    lk.attach(model, lk.LoRA(rank=1), "attention", name="all")
    lk.attach(model, lk.LoRA(rank=1), "attention.q_proj_weight", name="q")
    with refused(model, "different ways", "attention.in_proj_weight"):
        lk.combine(model, ["all", "q"], name="x")


def test_the_factors_of_a_nearly_cancelled_sum_keep_their_digits():
    torch.manual_seed(0)
    B, A, b, a = torch.randn(40, 3), torch.randn(3, 30), torch.randn(40, 2), torch.randn(2, 30)
    B2, A2 = concatenate([(B, A), (B, A), (b, a)], [1.0, -1.0, 1e-5])
    wanted = 1e-5 * b.double() @ a.double()
    found = recompress(B2, A2, rank=2)
    assert (found.B.double() @ found.A.double() - wanted).norm() < 1e-6 * wanted.norm()
    assert found.error < 1e-6
    assert torch.allclose(singular_values(B2, A2)[:2], torch.linalg.svdvals(wanted)[:2], rtol=1e-6)
    assert not singular_values(B, torch.zeros(3, 30)).any()
    with pytest.raises(lk.LorakitError, match="no sum"):
        concatenate([(B, A), (B[1:], A)], [1.0, 1.0])
    with pytest.raises(lk.LorakitError, match="NaN"):
        recompress(B * torch.nan, A)
