"""What a kind of layer is: how its weight is seen as a d×k matrix, and how a low-rank update acts on it.

A kind knows nothing of what is trained. It takes two factors, A and B, and says how they change the layer; every
variant is built from that. To add a kind, write one file: a final class below, registered with `kind_of` by type.
"""

from abc import ABC, abstractmethod
from functools import singledispatch
from typing import ClassVar

import torch
from torch import Tensor, nn


class Kind(ABC):
    """One weight of a layer, seen as a matrix of d rows (outputs) and k columns (inputs).

    A kind that is only this is *read*: the layer's owner takes the weight from its attribute, and an update can act
    in the weight alone.
    """

    name: ClassVar[str]
    """What `plan` calls it."""
    parameter: str
    """The name of the adapted parameter on its layer."""
    is_linear: bool
    """Whether `targets="all-linear"` selects it."""

    @abstractmethod
    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(d, k) of the weight seen as a matrix."""

    @abstractmethod
    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B, as they are stored and trained."""

    @abstractmethod
    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B·A in the weight's own shape; `weight` gives the shape and is not read."""


class CalledKind(Kind):
    """A layer that is *called*: an update can also sit beside the call and never form B·A."""

    @abstractmethod
    def beside(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Y + scale·B(A(x)) for the layer's input x and output y; x is in A's dtype, the result in y's."""


@singledispatch
def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer, by its type; None if it has none of its own.

    Only its parameters can then be adapted, each by name (`layers.Parameter`).
    """
    return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which updates are held and sums with a weight of `dtype` are formed: at least 32 bits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def flat_shape(weight: Tensor) -> tuple[int, int]:
    """(d, k) of a weight whose first axis is the output: every other axis belongs to the input."""
    return weight.shape[0], weight.shape[1:].numel()


def flat_factor_shapes(weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes (r, k) of A and (d, r) of B for such a weight."""
    d, k = flat_shape(weight)
    return (rank, k), (d, rank)
