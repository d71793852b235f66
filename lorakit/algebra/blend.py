"""Merging matrices that collide: trim, elect signs, drop and rescale. Everything here is dense."""

from collections.abc import Sequence

import torch
from torch import Tensor


def trimmed(W: Tensor, density: float) -> Tensor:
    """W with its largest entries, a share `density` of them and at least one, and zeros for the others."""
    count = W.numel()
    keep = max(1, min(count, round(density * count)))
    if keep == count:
        return W
    places = W.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(W).flatten().index_copy(0, places, W.flatten()[places]).view_as(W)


def elected(matrices: Sequence[Tensor]) -> Tensor:
    """For each entry the mean of those that have the sign of their sum; zeros have none."""
    stack = torch.stack(list(matrices))
    agree = stack.sign() == stack.sum(0).sign()
    agree &= stack != 0
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)


def dropped(W: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """W with each entry kept with probability `density` and divided by it, else zero."""
    keep = torch.rand(W.shape, generator=generator).to(W.device) < density
    return torch.where(keep, W / density, 0)
