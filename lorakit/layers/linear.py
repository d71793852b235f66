"""`nn.Linear`: W is (out, in), so d = out and k = in."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.layers.kind import (
    Inputs,
    Kind,
    LastAxisKind,
    flat_factor_shapes,
    flat_shape,
    register_kind,
    runs_its_own_forward,
)
from lorakit.layers.parameter import Parameter


@final
@dataclass(frozen=True)
class Linear(LastAxisKind):
    """A linear layer that is called. A is (r, in), B is (out, r)."""

    name: ClassVar[str] = "Linear"
    takes: ClassVar[Literal["vectors", "indices", "other"]] = "vectors"
    parameter: str = "weight"
    is_linear: bool = True

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in)."""
        return flat_shape(weight)

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in) and (out, r)."""
        return flat_factor_shapes(weight, rank)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """x·Wᵀ; x: (..., in)."""
        return F.linear(inputs[0], weight)

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Y + scale·(x·Aᵀ)·Bᵀ; x: (..., in), y: (..., out)."""
        return add_thin_product(y, inputs[0], A, B, scale)


def add_thin_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Y + scale·(x·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d)."""
    if A.device != y.device:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    h = F.linear(x, A)  # (..., r)
    if h.dtype != y.dtype or y.is_nested:
        return y + (F.linear(h, B) * scale).to(y.dtype)
    # One pass over y: the product, the scale and the sum in a single kernel.
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale).view(y.shape)


@register_kind
def _(layer: nn.Linear) -> Kind:
    return Parameter("weight", is_linear=True) if runs_its_own_forward(layer, nn.Linear) else Linear()


@register_kind
def _(layer: NonDynamicallyQuantizableLinear) -> Kind:
    # torch uses this type for `nn.MultiheadAttention.out_proj` alone, never calls it, and hands its weight to a
    # fused function: a hook on it would be a silent no-op.
    return Parameter("weight", is_linear=True)
