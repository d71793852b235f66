"""How the cost grows with rank, layers and tokens: no term may grow faster than the arithmetic."""

import math
from collections.abc import Iterator

import torch
from torch import nn

import lorakit as lk
from benchmarks.speed.layer import step
from benchmarks.speed.models import linear, ours
from benchmarks.speed.timing import Result, interleaved

AIM = 1.1
"""Of an exponent: 1 is as the arithmetic; the rest is left to the clock and the caches."""


def growth(quick: bool = False) -> Iterator[Result]:
    """A step (forward and backward) over rank, layers and tokens.

    The floor is the frozen model's with LoRA's own arithmetic added, as for one layer. Then the exponents of the cost,
    by least squares in log-log over the upper half of each range: over rank of what the adapter adds to the frozen
    step, over layers and tokens of the whole step. The arithmetic has 1 in all three.
    """
    ranks = (1, 2, 4, 8) if quick else (1, 4, 16, 64, 256)
    cases = {r: _models(linear(16 if quick else 512), r) for r in ranks}
    yield from _over("rank", cases, 4 if quick else 512, quick, extra=True)
    layers = (1, 2, 3, 4) if quick else (1, 7, 28, 112, 224)
    cases = {count: _models(linear(16 if quick else 128, layers=count), 8) for count in layers}
    yield from _over("layers", cases, 4 if quick else 64, quick)
    tokens = (2, 4, 8, 16) if quick else (16, 64, 256, 1024, 2048, 8192)
    models = _models(linear(16 if quick else 256), 8)
    yield from _over("tokens", dict.fromkeys(tokens, models), None, quick)


def _models(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    return {"frozen": base, "lorakit": ours(base, rank)}


def _over(
    what: str, cases: dict[int, dict[str, nn.Module]], n: int | None, quick: bool, extra: bool = False
) -> Iterator[Result]:
    """A case for each size, and the exponents over them; n is the number of rows, or the size itself is."""
    found: dict[int, dict[str, float]] = {}
    for size, models in cases.items():
        x = torch.randn(n or size, models["frozen"][0].in_features, requires_grad=True)
        gradient = torch.randn_like(x)
        arms = {name: step(model, x, gradient) for name, model in models.items()}
        found[size] = interleaved(arms, quick=quick)
        rank = lk.adapters(models["lorakit"])["default"].variant.rank
        found[size] = {"floor": found[size]["frozen"] * (1 + 3 * rank / x.shape[1]), **found[size]}
        yield Result(f"{what}: {size}", found[size])
    upper = list(found)[len(found) // 2 :]
    times = {"lorakit": [found[size]["lorakit"] - extra * found[size]["frozen"] for size in upper]}
    if not extra:
        times["frozen"] = [found[size]["frozen"] for size in upper]
    values = {arm: exponent(upper, [max(t, 1e-9) for t in seconds]) for arm, seconds in times.items()}
    yield Result(f"{what}: exponent from {upper[0]}", {"floor": 1.0, **values}, aim=AIM, unit="exponent")


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(sizes)."""
    xs, ys = [math.log(size) for size in sizes], [math.log(t) for t in seconds]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
