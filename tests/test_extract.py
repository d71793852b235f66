"""The difference of two checkpoints as an adapter: nothing lost that is not said, and merged it is the tuned one again."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from test_merge_checkpoint import gpt2, llama, saved, values
from torch import Tensor, nn

import lorakit as lk
from lorakit import LorakitError
from lorakit.algebra import approximate, decompose, randomized_svd
from lorakit.extract import extract
from lorakit.merge_checkpoint import merge_checkpoint


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
        assert torch.allclose(fresh(x).logits.float(), tuned(x).logits.float(), atol=1e-4 if dtype is torch.float32 else 0.1)
