"""Convolutions: W is (out, in/groups, *kernel); d = out, k is all the rest.

A is a convolution to r channels with the layer's own stride, padding and dilation, B a 1×1 one from there to the
outputs. With groups, W's matrix has one row per output and in/groups·kernel columns, so A is one small kernel that
every group applies to its own inputs, and each output takes from the r channels of its group: exactly the rank-r
update of the stored weight, which merges into it.
"""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from lorakit.layers.kind import (
    CalledKind,
    Inputs,
    Kind,
    flat_shape,
    register_kind,
    rescaled,
    runs_its_own_forward,
)
from lorakit.layers.parameter import Parameter
from lorakit.layers.thin import Strength

_PLAIN: dict[int, Callable[..., Tensor]] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    3: torch.conv_transpose1d,
    4: torch.conv_transpose2d,
    5: torch.conv_transpose3d,
}
"""torch's functions by the number of axes of the weight."""


class _ChannelsKind(CalledKind, ABC):
    """A layer whose outputs are the channels: (N, out, *size) or (out, *size)."""

    @final
    def has_rows(self, layer: nn.Module, y: Tensor) -> bool:
        """Whether there is an N."""
        return y.dim() == len(cast(nn.Conv2d, layer).kernel_size) + 2

    @final
    def scale_rows(self, layer: nn.Module, inputs: Inputs, y: Tensor, factor: Tensor) -> Tensor:
        """Y·factor + (1 − factor)·bias for each channel."""
        bias = cast(nn.Conv2d, layer).bias
        return rescaled(y, _by_channel(layer, factor), None if bias is None else _by_channel(layer, bias))


def _by_channel(layer: nn.Module, vector: Tensor) -> Tensor:
    """One number for each channel, (out,), laid out to broadcast over the layer's output."""
    return vector.view(-1, *(1 for _ in cast(nn.Conv2d, layer).kernel_size))


@final
@dataclass(frozen=True)
class Convolution(_ChannelsKind):
    """A convolution of one to three dimensions. A is (r, in/groups, *kernel), B is (out, r, 1, ...)."""

    name: ClassVar[str] = "Conv"
    parameter: str = "weight"
    is_linear: bool = False

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in/groups·kernel)."""
        return flat_shape(weight)

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in/groups, *kernel) and (out, r, 1, ...)."""
        return (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))

    def matrix_of(self, weight: Tensor) -> Tensor:
        """(out, in/groups·kernel)."""
        return weight.flatten(1)

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(out, in/groups, *kernel)."""
        return matrix.reshape(weight.shape)

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """The convolution with this weight; torch's own helper applies the padding mode, "same" and all."""
        return cast(Tensor, cast(nn.Conv2d, layer)._conv_forward(inputs[0], weight, None))

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·B(A(x)); x: (N, in, *size) or (in, *size)."""
        groups = cast(nn.Conv2d, layer).groups
        h = self.call(layer, inputs, y, A.repeat(groups, *(1 for _ in A.shape[1:])))  # r channels for each group
        return y + (_PLAIN[B.dim()](h, B, groups=groups) * scale).to(y.dtype)


@final
@dataclass(frozen=True)
class TransposedConvolution(_ChannelsKind):
    """A transposed convolution: W is (in, out/groups, *kernel). A is (r, in/groups, *kernel), B is (out, r, 1, ...)."""

    name: ClassVar[str] = "ConvTranspose"
    groups: int
    parameter: str = "weight"
    is_linear: bool = False

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in/groups·kernel)."""
        return flat_shape(self._by_outputs(weight))

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in/groups, *kernel) and (out, r, 1, ...)."""
        size = weight.shape
        return (rank, size[0] // self.groups, *size[2:]), (size[1] * self.groups, rank, *(1 for _ in size[2:]))

    def matrix_of(self, weight: Tensor) -> Tensor:
        """(out, in/groups·kernel)."""
        return self._by_outputs(weight).flatten(1)

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(in, out/groups, *kernel)."""
        sizes = (weight.shape[1], weight.shape[0] // self.groups, *weight.shape[2:])
        return matrix.reshape(self.groups, *sizes).transpose(1, 2).reshape(weight.shape)

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·B(A(x)); x: (N, in, *size) or (in, *size)."""
        groups = cast(nn.ConvTranspose2d, layer).groups
        kernel = A.transpose(0, 1).repeat(groups, *(1 for _ in A.shape[1:]))  # (in, r, *kernel)
        return y + (_PLAIN[B.dim()](self.call(layer, inputs, y, kernel), B, groups=groups) * scale).to(y.dtype)

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """The transposed convolution with this weight, of y's size."""
        conv, x = cast(nn.ConvTranspose2d, layer), inputs[0]
        n = weight.dim() - 2
        # What the output has beyond its smallest size: the layer's own output_padding, or what output_size asked for.
        extra = [
            y.shape[i - n]
            - (x.shape[i - n] - 1) * conv.stride[i]
            + 2 * int(conv.padding[i])
            - conv.dilation[i] * (conv.kernel_size[i] - 1)
            - 1
            for i in range(n)
        ]
        padding = cast(tuple[int, ...], conv.padding)
        return _TRANSPOSED[n + 2](x, weight, None, conv.stride, padding, extra, conv.groups, conv.dilation)

    def _by_outputs(self, weight: Tensor) -> Tensor:
        """(out, in/groups, *kernel)."""
        by_group: Tensor = weight.unflatten(0, (self.groups, -1))
        return by_group.transpose(1, 2).flatten(0, 1)


_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register_kind(nn.Conv1d)
@register_kind(nn.Conv2d)
@register_kind(nn.Conv3d)
def _(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Kind:
    own = all(type(layer)._conv_forward is not cls._conv_forward for cls in _CLASSES)
    return Parameter("weight", flat=True) if own or runs_its_own_forward(layer, *_CLASSES) else Convolution()


@register_kind(nn.ConvTranspose1d)
@register_kind(nn.ConvTranspose2d)
@register_kind(nn.ConvTranspose3d)
def _(layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Kind:
    if runs_its_own_forward(layer, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        return Parameter("weight", flat=True)
    return TransposedConvolution(layer.groups)
