"""A parameter that holds several matrices one below the other, each with a name and an update of its own."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from lorakit.layers.kind import Kind, stack_factor_shapes


@final
@dataclass(frozen=True)
class Slices(Kind):
    """A parameter (N·d, k) of N named slices, of which some or all are adapted, each by itself.

    With n slices chosen, A is (n, r, k) and B is (n, d, r), in the order of `names`: n updates of rank r, one batched
    product. A single update of the whole parameter is `Parameter`, whose A all slices share.
    """

    name: ClassVar[str] = "Slices"
    parameter: str
    names: tuple[str, ...]
    """All slices, from the first rows to the last."""
    slices: tuple[str, ...]
    """Those that are adapted."""
    is_linear: bool = False

    def only(self, chosen: set[str]) -> "Slices":
        """The same parameter, with these of its slices."""
        return replace(self, slices=tuple(name for name in self.names if name in chosen))

    def matrix_shape(self, weight: Tensor) -> tuple[int, int, int]:
        """(n, d, k): a stack of the chosen slices."""
        return len(self.slices), weight.shape[0] // len(self.names), weight.shape[1:].numel()

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(n, r, k) and (n, d, r)."""
        what = f"{self.parameter!r} holds {len(self.names)} slices"
        return stack_factor_shapes(self.matrix_shape(weight), rank, what)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The chosen slices: (n, d, k)."""
        stack: Tensor = weight.unflatten(0, (len(self.names), -1)).flatten(2)
        if self.slices == self.names:
            return stack
        return torch.stack([stack[i] for i, name in enumerate(self.names) if name in self.slices])

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The chosen slices (n, d, k) in the parameter's shape, zeros in the others."""
        if self.slices == self.names:
            return matrix.reshape(weight.shape)
        chosen = dict(zip(self.slices, matrix, strict=True))
        zeros = torch.zeros_like(matrix[0])
        return torch.cat([chosen.get(name, zeros) for name in self.names]).reshape(weight.shape)
