"""Any parameter of any module, chosen by its name and adapted where it is read."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lorakit.layers.kind import Kind, flat_factor_shapes, flat_shape, stack_factor_shapes


@final
@dataclass(frozen=True)
class Parameter(Kind):
    """A parameter of two or more axes.

    Three axes (E, d, k) are a stack of E matrices, such as the experts of a mixture: each has an update of its own, all
    of them one batched product. A is (E, r, k), B is (E, d, r). Otherwise, or if `flat`, the first axis is d and all
    others together are k; A is (r, k), B is (d, r).
    """

    name: ClassVar[str] = "Parameter"
    parameter: str
    is_linear: bool = False
    flat: bool = False

    def matrix_shape(self, weight: Tensor) -> tuple[int, ...]:
        """(d, k), or (E, d, k) of a stack."""
        return tuple(weight.shape) if self._is_stack(weight) else flat_shape(weight)

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, k) and (d, r), after the stack's axis if there is one."""
        if not self._is_stack(weight):
            return flat_factor_shapes(weight, rank)
        count, d, k = weight.shape
        return stack_factor_shapes((count, d, k), rank, f"the weight is a stack of {count} matrices")

    def matrix_of(self, weight: Tensor) -> Tensor:
        """(d, k), or (E, d, k) of a stack."""
        return weight if self._is_stack(weight) else weight.flatten(1)

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The matrix in the parameter's shape."""
        return matrix.reshape(weight.shape)

    def _is_stack(self, weight: Tensor) -> bool:
        return weight.dim() == 3 and not self.flat
