"""The product of two thin factors beside a linear map, shared by every kind that is one."""

import torch
from torch import Tensor
from torch.nn import functional as F

_MANY = 128
"""Rows from which the gradient of B costs more than a copy of B."""


def add_thin_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Y + scale·(x·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d)."""
    if A.device != y.device:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    # Laid out otherwise, torch would take one kernel or another by whether A requires a gradient, and round otherwise.
    h = F.linear(x.contiguous(), A)  # (..., r)
    if h.dtype != y.dtype or y.is_nested:
        return y + (F.linear(h, B) * scale).to(y.dtype)
    h = h.reshape(-1, h.shape[-1])
    Bt = B.t()  # (r, d)
    if not torch.jit.is_tracing() and h.shape[0] >= _MANY:  # what is traced must not depend on the number of rows
        # The gradient of a matrix that lies in memory as (r, d) is computed as hᵀ·g, and as (gᵀ·h)ᵀ where it lies
        # transposed, which is many times slower for a small r. The copy is worth it where rows are many. It is made
        # without gradients too: the two ways round otherwise, and PiSSA's two products, of which one trains, would not
        # cancel to the bit.
        Bt = Bt.contiguous()
    # One pass over y: the product, the scale and the sum in a single kernel.
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, Bt, alpha=scale).view(y.shape)
