"""The difference of two checkpoints as an adapter: nothing is lost unsaid, and merged it is the tuned one again."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge_checkpoint import gpt2, llama, saved, values
from torch import Tensor, nn

import lorakit as lk
from lorakit import LorakitError
from lorakit.algebra import approximate, decompose, numerical_rank, randomized_svd
from lorakit.checkpoints.extracting import extract
from lorakit.checkpoints.merging import merge_checkpoint


def product(d: int, k: int, rank: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, rank, generator=generator) @ torch.randn(rank, k, generator=generator) / (d * k) ** 0.25


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(24, 40),
        "a.bias": torch.randn(24),
        "embed.weight": torch.randn(30, 16),
        "conv.weight": torch.randn(8, 4, 3, 3),
        "conv1.weight": torch.randn(8, 4, 5),
        "experts.w": torch.randn(3, 12, 10),
        "same.weight": torch.randn(5, 5),
    }


RANK2 = {"a.weight": (24, 40), "embed.weight": (30, 16), "conv.weight": (8, 36), "conv1.weight": (8, 20)}


def tuned_at_rank_2(base: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned = dict(base)
    for name, (d, k) in RANK2.items():
        tuned[name] = base[name] + product(d, k, 2).view(base[name].shape)
    tuned["experts.w"] = base["experts.w"] + torch.stack([product(12, 10, 2, seed) for seed in range(3)])
    tuned["a.bias"] = base["a.bias"] + 1
    return tuned


@pytest.mark.parametrize("bound", [{}, {"rank": 2}, {"error": 0.0}, {"energy": 1.0}, {"error": 1e-4}], ids=str)
def test_a_low_rank_change_comes_back(bound):
    base = weights()
    tuned = tuned_at_rank_2(base)
    adapter, report = extract(base, tuned, **bound)
    for weight in adapter.weights:
        wanted = tuned[weight.name] - base[weight.name]
        if weight.name == "a.bias":
            assert torch.equal(weight.tensors["value"], tuned["a.bias"])
            continue
        B, A = weight.product()
        got = (B @ A).mT if weight.name == "embed.weight" else B @ A
        assert relative(got.reshape(wanted.shape), wanted) < 1e-5
        assert weight.variant.rank == 2
    assert report.error < 1e-5 and report.unchanged == 1 and not report.not_captured
    assert {row.name: row.seen for row in report.weights} == {
        "a.weight": "Linear",
        "a.bias": "whole",
        "embed.weight": "Embedding",
        "conv.weight": "Conv",
        "conv1.weight": "Conv",
        "experts.w": "Parameter",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("live", [False, True])
def test_merged_it_is_the_tuned_checkpoint(make, dtype, live, tmp_path):
    model = make(dtype)
    base = saved(model, tmp_path / "base")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    adapter, report = extract(model if live else base, saved(tuned, tmp_path / "tuned"))
    tied = make is gpt2  # whose head has a name in the live model alone
    assert [name for name, _ in report.not_captured] == (["transformer.wte.weight"] if tied and not live else [])
    target = model if live else base
    merge_checkpoint(target, adapter, tmp_path / "out", least_survival=0)
    for name, tensor in values(tmp_path / "tuned").items():
        got = values(tmp_path / "out")[name]
        assert relative(got.float(), tensor.float()) < (1e-5 if dtype is torch.float32 else 2e-3), name
    if tied and not live:
        return
    fresh = copy.deepcopy(model)
    lk.load(fresh, adapter)
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(
            fresh(x).logits.float(), tuned(x).logits.float(), atol=1e-4 if dtype is torch.float32 else 0.1
        )


@pytest.mark.parametrize("shape", [(400, 500), (700, 300)])
def test_a_randomized_decomposition_is_nearly_the_best(shape):
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 300))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 300))
    W = U * torch.arange(1, 301).pow(-0.5) @ V.T  # a spectrum that falls slowly
    for rank in (1, 8, 40):
        best, found = decompose(W, rank), randomized_svd(W, rank)
        assert found.B.shape == (shape[0], rank) and found.A.shape == (rank, shape[1])
        assert found.error <= 1.01 * best.error
        assert found.error == pytest.approx(float((W - found.B @ found.A).norm()), rel=1e-4)
        assert torch.allclose(found.singular_values, best.singular_values[:rank], rtol=0.02)
        assert torch.equal(found.B, randomized_svd(W, rank).B)  # the same for the same seed
    for wrong in (0, 301, True, 2.0):
        with pytest.raises(LorakitError, match="rank"):
            randomized_svd(torch.randn(300, 301), wrong)


def test_large_and_small_matrices_meet_their_bounds_at_the_smallest_rank():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(side, 300)).Q for side in (700, 300))
    large = U * 0.8 ** torch.arange(300) @ V.T
    for W in (large, large[:60, :50].contiguous(), large.T):
        values = torch.linalg.svdvals(W.double())
        left = values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()  # by the rank that is kept
        for error in (0.5, 0.1, 0.01):
            found = approximate(W, error=error)
            assert found.B.shape[1] == int((left > error).sum())
            assert found.error <= 1.001 * error * float(values.norm())
        assert approximate(W, energy=0.9).B.shape[1] == int((left.square() > 0.1).sum())
        assert approximate(W, 3, error=0.01).B.shape[1] == 3
        assert approximate(W, 10**6, error=0.5).B.shape[1] == int((left > 0.5).sum())
        for exact in ({}, {"error": 0.0}, {"energy": 1.0}):
            assert approximate(W, **exact).B.shape[1] == numerical_rank(W)
    assert approximate(torch.zeros(4, 5)).B.shape == (4, 1)
    for wrong in ({"energy": 2}, {"error": -1}, {"rank": 0}):
        with pytest.raises(LorakitError):
            approximate(large, **wrong)


@pytest.mark.parametrize("bound", [{"rank": 4}, {"energy": 0.7}, {"error": 0.3}], ids=str)
def test_the_stated_error_is_that_of_the_merged_checkpoint(bound, tmp_path):
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(300, 280), "b.weight": torch.randn(20, 30), "b.bias": torch.randn(20)}
    tuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}
    adapter, report = extract(base, tuned, **bound)
    merge_checkpoint(base, adapter, tmp_path / "x.safetensors")
    merged = load_file(tmp_path / "x.safetensors")
    for row in report.weights:
        change = tuned[row.name] - base[row.name]
        assert float((merged[row.name] - tuned[row.name]).norm() / change.norm()) == pytest.approx(row.error, abs=1e-4)
        assert row.rank <= bound.get("rank", 10**6) and row.error <= bound.get("error", 1)
        assert row.error**2 <= 1 - bound.get("energy", 0) + 1e-4
    assert max(row.error for row in report.weights) > 0.1 and 0.1 < report.error < 1
    lk.write(adapter, tmp_path / "adapter")
    again = lk.read(tmp_path / "adapter")
    assert {w.name: w.variant for w in again.weights} == {w.name: w.variant for w in adapter.weights}


def test_a_16_bit_change_is_exact():
    base = {"a.weight": torch.randn(20, 30).bfloat16(), "n.weight": torch.randn(9).half()}
    tuned = {name: tensor * 1.01 for name, tensor in base.items()}
    adapter, _ = extract(base, tuned)
    whole = next(weight for weight in adapter.weights if weight.name == "n.weight")
    assert torch.equal(whole.tensors["value"], tuned["n.weight"].float())
    B, A = adapter.weights[0].product()
    assert B.dtype == torch.float32
    assert relative(B @ A, tuned["a.weight"].float() - base["a.weight"].float()) < 1e-5


def test_what_is_not_captured_is_named():
    base = weights() | {"old": torch.zeros(1), "n.running_mean": torch.zeros(3), "ids": torch.arange(3)}
    base |= {"up.weight": torch.randn(4, 6, 2, 2), "up.bias": torch.randn(6), "half.weight": torch.randn(4, 4)}
    tuned = {name: tensor + 1 for name, tensor in base.items() if name != "old"} | {"new": torch.zeros(1)}
    tuned["embed.weight"] = torch.cat([tuned["embed.weight"], torch.zeros(2, 16)])
    tuned["half.weight"] = tuned["half.weight"].to(torch.int8)
    adapter, report = extract(base, tuned, targets=["a", "conv*", "embed", "half", "ids", "n", "up"], rank=4)
    missed = dict(report.not_captured)
    words = {
        "old": "base alone",
        "new": "tuned checkpoint alone",
        "embed.weight": "30×16 in the base and 32×16",
        "half.weight": "int8",
        "ids": "int64",
        "n.running_mean": "buffer",
        "experts.w": "not in targets",
        "same.weight": "not in targets",
    }
    assert missed.keys() == words.keys()
    for name, word in words.items():
        assert word in missed[name] and word in str(report)
    assert {row.name: row.seen for row in report.weights if row.name.startswith("up")} == {
        "up.weight": "whole",
        "up.bias": "whole",
    }
    assert {weight.name for weight in adapter.weights} == set(base) - set(words)


def test_what_cannot_be_extracted_is_an_error():
    base = weights()
    with pytest.raises(LorakitError, match="nothing changed"):
        extract(base, dict(base))
    with pytest.raises(LorakitError, match="nothing changed"):
        extract({"a": torch.zeros(3)}, {"a": -torch.zeros(3)})  # the same but for the sign of zeros
    with pytest.raises(LorakitError, match="matches no tensor"):
        extract(base, tuned_at_rank_2(base), targets=["a", "b"])
    with pytest.raises(LorakitError, match="names alone"):
        extract(base, tuned_at_rank_2(base), targets=[nn.Linear])
    nan = {name: tensor * float("nan") if "a." in name else tensor for name, tensor in base.items()}
    with pytest.raises(LorakitError) as caught:
        extract(base, nan)
    assert "'a.weight'" in str(caught.value) and "'a.bias'" in str(caught.value)
    masks = {"mask": torch.full((3, 3), -torch.inf)}
    extract(base | masks, tuned_at_rank_2(base) | masks)  # what has not changed may be infinite
    for wrong in ({"rank": 0}, {"energy": 1.5}, {"error": float("nan")}):
        with pytest.raises(LorakitError, match=next(iter(wrong))):
            extract(base, tuned_at_rank_2(base), **wrong)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocabulary = nn.Embedding(6, 6, padding_idx=1)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2)
        self.stack = nn.Parameter(torch.randn(2, 4, 5))
        self.norm = nn.BatchNorm1d(3)


def test_a_live_model_says_how_its_weights_are_seen(tmp_path):
    base, tuned = Net(), Net()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter, report = extract(base, tuned.state_dict(), rank=6)
    assert {row.by for row in report.weights} == {"module"}
    seen = {row.name: row.seen for row in report.weights}
    assert seen["vocabulary.weight"] == "Embedding" and seen["bilinear.weight"] == "Bilinear"
    assert seen["up.weight"] == "ConvTranspose" and seen["stack"] == "Parameter"
    padded = next(row for row in report.weights if row.name == "vocabulary.weight")
    row = tuned.vocabulary.weight[1] - base.vocabulary.weight[1]
    assert padded.error * padded.change == pytest.approx(float(row.detach().norm()), rel=1e-4)
    lk.load(base, adapter)
    lk.merge(base)
    errors = {weight.name: weight.error * weight.change for weight in report.weights}
    for name, parameter in base.named_parameters():
        got = float((parameter - dict(tuned.named_parameters())[name]).detach().norm())
        assert got == pytest.approx(errors[name], rel=1e-3, abs=1e-4), name
    merge_checkpoint(Net(), adapter, tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, base.state_dict()[name]), name


def test_progress_is_in_bytes_and_the_same_comes_out_twice(tmp_path):
    base = weights()
    steps: list[tuple[int, int, str]] = []
    first, _ = extract(base, tuned_at_rank_2(base), progress=lambda *step: steps.append(step))
    assert [name for _, _, name in steps] == [*base, ""] and steps[-1][0] == steps[-1][1]
    save_file(tuned_at_rank_2(base), tmp_path / "tuned.safetensors")
    second, _ = extract(base, tmp_path / "tuned.safetensors")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize("coarse", ["base", "tuned"])
def test_checkpoints_of_two_dtypes_differ_in_what_was_trained(coarse):
    """What one has of the other but for rounding is unchanged; what was trained is captured."""
    torch.manual_seed(0)
    base = {name: torch.randn(12, 9) for name in ("same.weight", "trained.weight")}
    tuned = {**base, "trained.weight": base["trained.weight"] + torch.randn(12, 2) @ torch.randn(2, 9)}
    pair = {"base": base, "tuned": tuned}
    pair[coarse] = {name: tensor.to(torch.bfloat16) for name, tensor in pair[coarse].items()}
    adapter, report = extract(pair["base"], pair["tuned"], rank=2)
    assert [weight.name for weight in adapter.weights] == ["trained.weight"]
    assert report.unchanged == 1 and report.mixed == 1 and "two dtypes" in str(report)
    B, A = adapter.weights[0].product()
    wanted = pair["tuned"]["trained.weight"].float() - pair["base"]["trained.weight"].float()
    assert (B @ A - wanted).norm() < 0.01 * wanted.norm()
