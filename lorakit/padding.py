"""Factors of a larger rank than they have, filled up with zeros: the same ΔW in another shape.

Compiled code takes other tensors in the place of an adapter's only if they have the same shapes, and stacked factors of
several adapters are one tensor; both are had with one rank for all.
"""

from dataclasses import replace

import torch
from torch import nn

from lorakit.change import Addition
from lorakit.errors import LorakitError
from lorakit.layers import outline
from lorakit.plan import Plan
from lorakit.variants import Full, LowRank, Rows, Variant


def pad(plan: Plan, additions: list[Addition], rank: int) -> tuple[Plan, list[Addition]]:
    """The same adapter with factors of this rank everywhere, and its plan.

    Raises:
        LorakitError: what stands against it, for each weight.
    """
    grown, problems = [], []
    for row, addition in zip(plan.rows, additions, strict=True):
        try:
            whole = isinstance(addition.variant, Full | Rows)  # trained beside it, in a shape that has no rank
            grown.append(addition if whole else _padded(addition, rank))
        except LorakitError as error:
            problems.append(f"{row.layer!r}: {error}")
    if problems:
        raise LorakitError("".join([f"cannot be given rank {rank}:", *(f"\n  - {problem}" for problem in problems)]))
    rows = tuple(
        row._replace(
            tensors={name: tuple(tensor.shape) for name, tensor in addition.update.named_parameters()},
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in addition.update.parameters()),
        )
        for row, addition in zip(plan.rows, grown, strict=True)
    )
    return replace(plan, variant=_wider(plan.variant, rank), rows=rows), grown


def _wider(variant: Variant, rank: int) -> LowRank:
    """The variant with this rank and the same scale."""
    if not isinstance(variant, LowRank):
        raise LorakitError(f"a {type(variant).__name__} has no factors A and B to fill up")
    if rank < variant.rank:
        raise LorakitError(f"its rank is {variant.rank} already; combine(..., rank={rank}) lowers it")
    return replace(variant, rank=rank, alpha=variant.scale * (rank**0.5 if variant.scaling == "rslora" else rank))


def _padded(addition: Addition, rank: int) -> Addition:
    """The same update. Zeros in both factors stay zeros in training: the gradient of one is a product of the other."""
    update, kind = addition.update, addition.update.kind
    variant = _wider(addition.variant, rank)
    weight = torch.empty_like(outline(addition.layer, kind), device="meta")
    fresh = variant.build(kind, weight, update.mode)
    axis = len(kind.matrix_shape(weight)) - 2  # of A's ranks; of B's it is the next
    grows = {"A": axis, "A0": axis, "B": axis + 1, "B0": axis + 1}
    for name, tensor in update.state_dict().items():
        if name in grows:
            shape = list(tensor.shape)
            shape[grows[name]] = rank - shape[grows[name]]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], grows[name])
        setattr(fresh, name, nn.Parameter(tensor) if name in fresh._parameters else tensor)
    return addition._replace(update=fresh, variant=variant)
