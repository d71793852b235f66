"""Transformers' `Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from lorakit.layers.kind import CalledKind, Inputs, Kind, register_late
from lorakit.layers.thin import add_thin_product


@final
@dataclass(frozen=True)
class TransposedLinear(CalledKind):
    """A linear layer whose weight is (in, out): d = out, k = in. A is (r, in), B is (out, r)."""

    name: ClassVar[str] = "Conv1D (transformers)"
    parameter: str = "weight"
    is_linear: bool = True

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in)."""
        return weight.shape[1], weight.shape[0]

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in) and (out, r)."""
        return (rank, weight.shape[0]), (weight.shape[1], rank)

    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(B·A)ᵀ: (in, out)."""
        return (B @ A).mT

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Y + scale·(x·Aᵀ)·Bᵀ; x: (..., in), y: (..., out)."""
        return add_thin_product(y, inputs[0], A, B, scale)


@register_late("transformers.pytorch_utils", "Conv1D")
def _(layer: Any) -> Kind:
    return TransposedLinear()
