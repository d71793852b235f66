"""Linear layers whose weight is not a matrix of floats that torch's `nn.Linear` would read.

Quantized layers (bitsandbytes, torchao, `torch.ao`, and any other library's) and layers of another make: all that is
asked of one is that it says its sizes, `in_features` and `out_features`, and maps (..., in) to (..., out). How it does
that, and how it stores its weight, is its own affair: the update sits beside the call (QLoRA: Dettmers et al. 2023,
arXiv:2305.14314, §3).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import LorakitError
from lorakit.layers.kind import Inputs, Kind, VectorKind, attribute, base_weight, kinds_of, register_kind, register_late
from lorakit.layers.stored import as_floats, called, scheme_of, weight_object


@final
@dataclass(frozen=True)
class Foreign(VectorKind):
    """A linear layer with a weight of its own make. A is (r, in), B is (out, r); the sizes are the layer's word."""

    name: ClassVar[str] = "Linear (foreign)"
    may_sever: ClassVar[bool] = True
    inputs: int
    outputs: int
    scheme: str | None = None
    """How the weight is quantized; None if it is not known to be."""
    parameter: str = "weight"
    is_linear: bool = True

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in)."""
        return self.outputs, self.inputs

    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(r, in) and (out, r)."""
        return (rank, self.inputs), (self.outputs, rank)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """x·Wᵀ; x: (..., in)."""
        self.check(layer, inputs[0], y)
        return F.linear(inputs[0].contiguous(), weight)  # laid out otherwise, it might round otherwise

    def check(self, layer: nn.Module, x: Tensor, y: Any) -> None:
        """Whether the layer does what it says."""
        if not isinstance(y, Tensor) or x.shape[-1] != self.inputs or y.shape[-1] != self.outputs:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise LorakitError(
                f"{called(layer)} says it maps (..., {self.inputs}) to (..., {self.outputs}), and gave {got} for "
                f"{tuple(x.shape)}: it is no linear layer; exclude it"
            )

    @property
    def note(self) -> str:
        """What a plan says of it."""
        return f"frozen by quantization: {self.scheme}" if self.scheme else "no nn.Linear: called, its weight unread"


def foreign_kind(layer: nn.Module) -> Kind | None:
    """The kind of a layer that says its sizes; None if it does not, or if it is made of layers that can be adapted."""
    inputs = attribute(layer, "in_features")
    outputs = None if inputs is None else attribute(layer, "out_features")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in (inputs, outputs)):
        return None
    if any(child is not None and _holds_a_layer(child) for child in layer._modules.values()):
        return None
    return Foreign(inputs, cast(int, outputs), scheme_of(weight_object(layer)))


def _holds_a_layer(module: nn.Module) -> bool:
    return any(kinds_of(part) for part in module.modules())


def as_foreign(layer: nn.Module) -> Foreign | None:
    """The layer's kind if it is a foreign one."""
    return next((kind for kind in kinds_of(layer) if isinstance(kind, Foreign)), None)


def outline(layer: nn.Module, kind: Kind) -> Tensor:
    """A tensor with the shape, dtype and device of the weight as the kind sees it: the weight itself where it can be.

    For a foreign layer it holds NaN and takes no memory: it is for building, not for reading (`dense_weight` is).
    """
    if not isinstance(kind, Foreign):
        return base_weight(layer, kind.parameter)
    weight: Any = weight_object(layer, kind.parameter)
    held = [weight] if weight is not None else list(layer._parameters.values()) + list(layer._buffers.values())
    device = next((tensor.device for tensor in held if tensor is not None), torch.device("cpu"))
    dtypes = [getattr(getattr(weight, "quant_state", None), "dtype", None), getattr(weight, "dtype", None)]
    plain = (dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2)
    empty = torch.full((1, 1), torch.nan, dtype=next(plain, torch.float32), device=device)
    return empty.expand(kind.outputs, kind.inputs)


def stored_dtype(layer: nn.Module, kind: Kind) -> str:
    """What a file says of how the weight was stored: its dtype, or how it is quantized."""
    now = as_foreign(layer) if isinstance(kind, Foreign) else None  # it may have been quantized since it was adapted
    return (now is not None and now.scheme) or str(outline(layer, kind).dtype).removeprefix("torch.")


def dense_weight(layer: nn.Module, kind: Kind) -> Tensor:
    """The base weight W as plain floats: dequantized if it is quantized, else the weight itself; (d, k) if foreign.

    No update acts in it, and no gradient goes back to what is quantized. This is what a method reads that needs W
    itself and not the layer's output alone.

    Raises:
        LorakitError: the weight is stored in a way that cannot be read, or is not known to be what the layer uses.
    """
    if not isinstance(kind, Foreign):
        return base_weight(layer, kind.parameter)
    if kind.scheme is None and weight_object(layer, kind.parameter) is not None:
        raise LorakitError(
            f"{called(layer)} may use its {kind.parameter} in its own way, so W is not known; keep to an update that "
            "asks for the layer's output alone, unmerged, or adapt the parameter by its name"
        )
    dense = as_floats(layer, kind.parameter)
    if dense is None:
        raise LorakitError(
            f"the weight of {called(layer)} cannot be read as floats: neither it nor the layer can be dequantized; "
            "keep to an update that asks for the layer's output alone, unmerged"
        )
    if dense.shape != (kind.outputs, kind.inputs):
        raise LorakitError(
            f"the weight of {called(layer)} reads as {tuple(dense.shape)}, not as the sizes that the layer says"
        )
    return dense


def check_read(layer: nn.Module, kind: Kind, needed: bool) -> None:
    """Whether W can be had as floats, if it is needed and has values.

    Raises:
        LorakitError: it cannot.
    """
    if needed and isinstance(kind, Foreign) and not outline(layer, kind).is_meta:
        dense_weight(layer, kind)


@register_kind
def _(layer: nn.Module) -> Kind | None:
    return foreign_kind(layer)


@register_late("torch.ao.nn.quantized.modules.linear", "Linear")
def _(layer: Any) -> Kind | None:
    return None  # its input is quantized too: nothing of floats can sit beside that


@register_late("torch.ao.nn.quantized.dynamic.modules.linear", "Linear")
def _(layer: Any) -> Kind | None:
    # A subclass of the one above, but of floats on both sides. In float16, torch unpacks its weight as plain floats.
    kind = foreign_kind(layer)
    half = isinstance(kind, Foreign) and kind.scheme is None
    return replace(cast(Foreign, kind), scheme="float16") if half else kind
