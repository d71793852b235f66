"""Any parameter of any module, chosen by its name and adapted where it is read."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lorakit.layers.kind import Kind, flat_factor_shapes, flat_shape


@final
@dataclass(frozen=True)
class Parameter(Kind):
    """A parameter of two or more axes: the first is d, all others together are k. A is (r, k), B is (d, r)."""

    name: ClassVar[str] = "Parameter"
    parameter: str
    is_linear: bool = False

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(first axis, all the others)."""
        return flat_shape(weight)

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, k) and (d, r)."""
        return flat_factor_shapes(weight, rank)

    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B·A in the parameter's shape."""
        return (B @ A).view(weight.shape)
