"""Adapters as values for tests: made from nothing, with weights of several kinds, and their dense ΔW."""

import torch
from hypothesis import strategies as st
from torch import Tensor

import lorakit as lk
from lorakit.header import WeightEntry
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight

KINDS = {
    "linear": ("Linear", (7, 5), lambda r: ((r, 5), (7, r))),
    "conv": ("Convolution", (6, 4, 3, 2), lambda r: ((r, 4, 3, 2), (6, r, 1, 1))),
    "words": ("Embedding", (9, 4), lambda r: ((r, 9), (4, r))),
    "experts": ("Parameter", (3, 6, 5), lambda r: ((3, r, 5), (3, 6, r))),
}
"""Name of the layer → kind, shape of the weight, shapes of A and B at a rank."""


def weight(
    layer: str, rank: int, seed: int, alpha: float | None = None, dtype=torch.float32, scale=1.0
) -> AdapterWeight:
    kind, shape, shapes = KINDS[layer]
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes(rank))
    parameter = "stack" if layer == "experts" else "weight"
    padding = 2 if layer == "words" else None
    entry = WeightEntry(layer, parameter, None, shape, None, None, kind=kind, padding_idx=padding)
    return AdapterWeight(entry, lk.LoRA(rank, alpha), {"A": A.to(dtype), "B": B.to(dtype)})


def adapter(seed: int, ranks: dict[str, int], alpha: float | None = None, dtype=torch.float32) -> Adapter:
    weights = tuple(weight(layer, rank, seed + i, alpha, dtype) for i, (layer, rank) in enumerate(ranks.items()))
    return Adapter(f"a{seed}", weights[0].variant, weights)


adapters = st.builds(
    adapter,
    seed=st.integers(0, 10_000),
    ranks=st.fixed_dictionaries(
        {"linear": st.integers(1, 6)}, optional=dict.fromkeys(list(KINDS)[1:], st.integers(1, 4))
    ),
    alpha=st.sampled_from([None, 0.5, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


def dense(one: Adapter) -> dict[str, Tensor]:
    """ΔW of each weight as a matrix, by the formula alpha/r·B·A, in 64 bits."""
    found = {}
    for each in one.weights:
        A, B = each.tensors["A"].double(), each.tensors["B"].double()
        inner = 2 if each.entry.kind == "Parameter" else 1
        delta = (B.flatten(inner) @ A.flatten(inner)) * ((each.variant.alpha or each.variant.rank) / each.variant.rank)
        if each.entry.padding_idx is not None:
            delta = delta.index_fill(-1, torch.tensor(each.entry.padding_idx), 0.0)
        found[each.name] = delta
    return found


def total(terms: list[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Σ weight·ΔW."""
    found: dict[str, Tensor] = {}
    for one, factor in terms:
        for name, delta in dense(one).items():
            found[name] = found.get(name, 0) + factor * delta
    return found


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-6, floor: float = 0.0) -> None:
    assert set(got) == set(wanted)
    for name, delta in wanted.items():
        assert (got[name] - delta).norm() <= share * delta.norm() + floor, name
