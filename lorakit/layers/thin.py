"""The product of two thin factors beside a linear map, shared by every kind that is one."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_thin_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Y + scale·(x·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d)."""
    if A.device != y.device:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    # Laid out otherwise, torch would take one kernel or another by whether A requires a gradient, and round otherwise.
    h = F.linear(x.contiguous(), A)  # (..., r)
    if h.dtype != y.dtype or y.is_nested:
        return y + (F.linear(h, B) * scale).to(y.dtype)
    # One pass over y: the product, the scale and the sum in a single kernel.
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale).view(y.shape)
