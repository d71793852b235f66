"""Embeddings: W is (number, dim), one row for each index; as a matrix it is its transpose, d = dim and k = number.

The row at `padding_idx` stays as it is, as torch promises of it: the update is zero there, and it sends no gradient.
Where torch does more than look up (`max_norm` rescales rows, `scale_grad_by_freq` weighs gradients, a bag takes the
maximum), the update acts in the weight, which that then applies to.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.kind import CalledKind, Inputs, Kind, LastAxisKind, register_kind, runs_its_own_forward
from lorakit.layers.parameter import Parameter
from lorakit.layers.thin import Strength


class _Table(Kind, ABC):
    """A weight of (number, dim). A is (r, number) and begins at zero, B is (dim, r)."""

    lookup: ClassVar[bool] = True
    parameter = "weight"
    is_linear = False

    @final
    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(dim, number)."""
        return weight.shape[1], weight.shape[0]

    @final
    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, number) and (dim, r)."""
        return (rank, weight.shape[0]), (weight.shape[1], rank)

    @final
    def matrix_of(self, weight: Tensor) -> Tensor:
        """(dim, number)."""
        return weight.t()

    @final
    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(number, dim), with zeros at the padding row."""
        change = matrix.mT
        if self.padding_idx is None:
            return change
        keep = change.new_ones(change.shape[0], 1)
        keep[self.padding_idx] = 0
        return change * keep


@final
@dataclass(frozen=True)
class Embedding(_Table, CalledKind):
    """`nn.Embedding`: a look-up."""

    name: ClassVar[str] = "Embedding"
    takes: ClassVar[Literal["vectors", "indices", "other"]] = "indices"
    padding_idx: int | None

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·A[:, x]ᵀ·Bᵀ; x: (...) of indices, y: (..., dim)."""
        (x, *_) = inputs
        update = F.linear(F.embedding(x, A.t()), B) * scale
        if self.padding_idx is not None:
            update = update.masked_fill((x == self.padding_idx).unsqueeze(-1), 0.0)
        return y + update.to(y.dtype)

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """The rows of this weight; x: (...) of indices."""
        return F.embedding(inputs[0], weight)

    def has_rows(self, layer: nn.Module, y: Tensor) -> bool:
        """Unless y is a single row."""
        return y.dim() > 1

    def scale_rows(self, layer: nn.Module, inputs: Inputs, y: Tensor, factor: Tensor) -> Tensor:
        """Y·factor along the last axis, and y itself where the padding is looked up."""
        y = y.to(torch.promote_types(y.dtype, factor.dtype))
        if self.padding_idx is None:
            return y * factor
        return torch.where((inputs[0] == self.padding_idx).unsqueeze(-1), y, y * factor)


@final
@dataclass(frozen=True)
class EmbeddingBag(_Table, LastAxisKind):
    """`nn.EmbeddingBag` with a sum or a mean."""

    name: ClassVar[str] = "EmbeddingBag"
    arguments: ClassVar[tuple[str, ...]] = ("input", "offsets", "per_sample_weights")
    padding_idx: int | None

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·bag(A, x)·Bᵀ, for indices, offsets and weights of the samples."""
        return y + (F.linear(self.call(layer, inputs, y, A.t()), B) * scale).to(y.dtype)

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """Sums or means of rows of this weight."""
        bag = cast(nn.EmbeddingBag, layer)
        x, offsets, weights = (*inputs, None, None)[:3]
        return F.embedding_bag(
            x,
            weight.contiguous(),
            offsets,
            mode=bag.mode,
            per_sample_weights=None if weights is None else weights.to(weight.dtype),
            include_last_offset=bag.include_last_offset,
            padding_idx=self.padding_idx,
        )


@final
@dataclass(frozen=True)
class ReadEmbedding(_Table):
    """An embedding that does more than look up: adapted in the weight."""

    name: ClassVar[str] = "Embedding (read)"
    padding_idx: int | None


def _does_more(layer: nn.Embedding | nn.EmbeddingBag) -> bool:
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse


@register_kind
def _(layer: nn.Embedding) -> Kind:
    if runs_its_own_forward(layer, nn.Embedding):
        return Parameter("weight")
    return ReadEmbedding(layer.padding_idx) if _does_more(layer) else Embedding(layer.padding_idx)


@register_kind
def _(layer: nn.EmbeddingBag) -> Kind:
    if runs_its_own_forward(layer, nn.EmbeddingBag):
        return Parameter("weight")
    if _does_more(layer) or layer.mode == "max":
        return ReadEmbedding(layer.padding_idx)
    return EmbeddingBag(layer.padding_idx)
