"""Writing a merged weight back into a quantized layer: with the scheme it had, or as the floats of a plain layer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers.foreign import Foreign
from lorakit.layers.stored import as_floats, called, unpacked


@dataclass(frozen=True)
class Requantized:
    """A weight quantized anew, and not yet on its layer."""

    attributes: dict[str, Any]
    """What to set on the layer: the weight, and the state that the layer keeps of it."""
    dense: Tensor
    """What it reads as: (d, k)."""


def requantized(layer: nn.Module, kind: Foreign, total: Tensor) -> Requantized:
    """The floats `total` (d, k), quantized as the layer's own weight is. The layer is not changed.

    Raises:
        LorakitError: how the layer's weight came to be is not known from the weight.
    """
    weight: Any = layer._parameters.get(kind.parameter)
    if getattr(weight, "quant_state", None) is not None:
        return _in_4_bits(layer, kind, weight, total)
    if hasattr(weight, "SCB") and weight.dtype == torch.int8 and hasattr(layer, "state"):
        return _in_8_bits(layer, kind, weight, total)
    raise LorakitError(
        f"{called(layer)} ({kind.scheme or 'its own make'}) does not say how to quantize a changed weight; keep the "
        + ("adapter beside it, or use merge(..., dequantize=True)" if kind.scheme else "adapter beside it")
    )


def _in_4_bits(layer: nn.Module, kind: Foreign, weight: Any, total: Tensor) -> Requantized:
    _, state = unpacked(weight)
    fresh = type(weight)(
        total.to(state.dtype),
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    ).to(weight.device)  # quantizes
    fresh.module = weight.module
    attributes = {kind.parameter: fresh}
    if hasattr(layer, "quant_state"):
        attributes["quant_state"] = fresh.quant_state
    return Requantized(attributes, _read_back(layer, attributes))


def _in_8_bits(layer: nn.Module, kind: Foreign, weight: Any, total: Tensor) -> Requantized:
    fresh = type(weight)(total.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)  # quantizes
    state: Any = copy.copy(layer.state)
    state.reset_grads()  # the integers and scales that the first call moves here
    attributes = {kind.parameter: fresh, "state": state}
    return Requantized(attributes, _read_back(layer, attributes))


def _read_back(layer: nn.Module, attributes: dict[str, Any]) -> Tensor:
    """What the layer would read with these attributes."""
    stand_in = nn.Module()
    for name, value in attributes.items():
        setattr(stand_in, name, value)
    dense = as_floats(stand_in)
    assert dense is not None
    return dense


def plain_linear(layer: nn.Module, kind: Foreign, total: Tensor, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` of this dtype with the weight `total` (d, k) and the layer's own bias."""
    bias: Any = getattr(layer, "bias", None)
    bias = bias() if callable(bias) else bias
    plain = nn.Linear(kind.inputs, kind.outputs, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(total.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(total.device, dtype), requires_grad=bias.requires_grad)
    return plain.train(layer.training)


def replace_layer(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put another layer into every place that a layer has in the model."""
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
