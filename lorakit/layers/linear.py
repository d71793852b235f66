"""`nn.Linear`: W is (out, in), so d = out and k = in."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.layers.foreign import foreign_kind
from lorakit.layers.kind import (
    Inputs,
    Kind,
    VectorKind,
    flat_factor_shapes,
    flat_shape,
    register_kind,
    runs_its_own_forward,
)
from lorakit.layers.parameter import Parameter
from lorakit.layers.stored import scheme_of


@final
@dataclass(frozen=True)
class Linear(VectorKind):
    """A linear layer that is called. A is (r, in), B is (out, r)."""

    name: ClassVar[str] = "Linear"
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
        return F.linear(inputs[0].contiguous(), weight)  # laid out otherwise, it might round otherwise

    def check(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Nothing to check."""


@register_kind
def _(layer: nn.Linear) -> Kind | None:
    if not _has_weight(layer) or scheme_of(layer._parameters.get("weight")) is not None:
        return foreign_kind(layer)
    return Parameter("weight", is_linear=True) if runs_its_own_forward(layer, nn.Linear) else Linear()


def _has_weight(layer: nn.Linear) -> bool:
    """Whether its weight is an attribute, set or computed, as torch's is: nothing is computed here."""
    if "weight" in layer._parameters or "weight" in vars(layer):
        return True
    computed = getattr(type(layer), "weight", None)
    return computed is not None and not callable(computed)


@register_kind
def _(layer: NonDynamicallyQuantizableLinear) -> Kind:
    # torch uses this type for `nn.MultiheadAttention.out_proj` alone, never calls it, and hands its weight to a
    # fused function: a hook on it would be a silent no-op.
    return Parameter("weight", is_linear=True)
