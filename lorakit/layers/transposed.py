"""Transformers' `Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from lorakit.layers.kind import Inputs, Kind, VectorKind, register_late
from lorakit.layers.thin import Term, add_thin_product


@final
@dataclass(frozen=True)
class TransposedLinear(VectorKind):
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

    def matrix_of(self, weight: Tensor) -> Tensor:
        """(out, in)."""
        return weight.t()

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(in, out)."""
        return matrix.t()

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """x·W; x: (..., in)."""
        x: Tensor = inputs[0]
        return x @ weight

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
        """Y + scale·(x·Aᵀ)·Bᵀ; x: (..., in), y: (..., out)."""
        return add_thin_product(y, x, term)


@register_late("transformers.pytorch_utils", "Conv1D")
def _(layer: Any) -> Kind:
    return TransposedLinear()
