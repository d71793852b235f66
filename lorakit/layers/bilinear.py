"""`nn.Bilinear`: W is (out, in1, in2); d = out, k = in1·in2."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.kind import Inputs, Kind, LastAxisKind, flat_shape, register_kind, runs_its_own_forward
from lorakit.layers.parameter import Parameter
from lorakit.layers.thin import Strength


@final
@dataclass(frozen=True)
class Bilinear(LastAxisKind):
    """A bilinear layer, y = x1ᵀ·W·x2 + b. A is (r, in1, in2), B is (out, r)."""

    name: ClassVar[str] = "Bilinear"
    arguments: ClassVar[tuple[str, ...]] = ("input1", "input2")
    parameter: str = "weight"
    is_linear: bool = False

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in1·in2)."""
        return flat_shape(weight)

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in1, in2) and (out, r)."""
        return (rank, *weight.shape[1:]), (weight.shape[0], rank)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """(out, in1·in2)."""
        return weight.flatten(1)

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(out, in1, in2)."""
        return matrix.reshape(weight.shape)

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """x1ᵀ·W·x2; x1: (..., in1), x2: (..., in2)."""
        x1, x2 = inputs
        return F.bilinear(x1, x2.to(weight.dtype), weight)

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·(x1ᵀ·A·x2)·Bᵀ; x1: (..., in1), x2: (..., in2), y: (..., out)."""
        x1, x2 = inputs
        h = F.bilinear(x1, x2.to(A.dtype), A)
        return y + (F.linear(h, B) * scale).to(y.dtype)


@register_kind
def _(layer: nn.Bilinear) -> Kind:
    return Parameter("weight", flat=True) if runs_its_own_forward(layer, nn.Bilinear) else Bilinear()
