"""The product of two thin factors beside a linear map, shared by every kind that is one."""

import torch
from torch import Tensor
from torch.nn import functional as F

_MANY = 128
"""Rows from which the gradient of B costs more than a copy of B."""


def add_thin_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Y + scale·(x·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d)."""
    if A.is_meta != y.is_meta:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    # Laid out otherwise, torch would take one kernel or another by whether A requires a gradient, and round otherwise.
    h = F.linear(x.contiguous(), A)  # (..., r)
    if h.dtype != y.dtype or y.is_nested:
        return y + (F.linear(h, B) * scale).to(y.dtype)
    shape = y.shape
    if len(shape) != 2:
        y, h = y.reshape(-1, shape[-1]), h.reshape(-1, h.shape[-1])
    Bt = B.t()  # (r, d)
    rows: object = h.shape[0]
    if isinstance(rows, int) and rows >= _MANY:  # a model that is traced must not depend on the number of rows
        # The gradient of a matrix that lies in memory as (r, d) is computed as hᵀ·g, and as (gᵀ·h)ᵀ where it lies
        # transposed, which is many times slower for a small r. The copy is worth it where rows are many. It is made
        # without gradients too: the two ways round otherwise, and PiSSA's two products, of which one trains, would not
        # cancel to the bit.
        Bt = Bt.contiguous()
    # One pass over y: the product, the scale and the sum in a single kernel.
    result = torch.addmm(y, h, Bt, alpha=scale)
    return result if len(shape) == 2 else result.view(shape)
