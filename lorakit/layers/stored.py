"""How a weight is stored, and the one place that knows how to read a quantized one as floats.

A weight may be plain floats, a tensor subclass that holds integers and scales (torchao), packed bytes beside a state
that unpacks them (bitsandbytes), a quantized tensor behind a method (`torch.ao`), or nothing that can be read at all.
Which it is, is told by what the objects can do. The libraries are not imported here: whoever made such a weight has.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lorakit.errors import LorakitError
from lorakit.layers.kind import base_weight


def scheme_of(weight: Any) -> str | None:
    """How a weight is quantized, in a word ("nf4", "int8", "qint8", "Int8Tensor"); None for plain floats."""
    if _is_plain(weight):
        return None
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return None
    if hasattr(weight, "quant_state"):  # 4 bits by bitsandbytes
        kind = getattr(weight, "quant_type", "4 bits")
        return str(kind) if weight.quant_state is not None else f"{kind}, not quantized yet"
    if hasattr(weight, "SCB"):  # 8 bits by bitsandbytes: one scale for each row
        if weight.dtype == torch.int8:
            return "int8"
        return "int8 at each call" if getattr(weight, "has_fp16_weights", False) else "int8, not quantized yet"
    if type(weight).dequantize is not Tensor.dequantize:  # a tensor subclass that knows how
        bits = getattr(weight, "target_dtype", None)
        return type(weight).__name__ + (f" of {_word(bits)}" if isinstance(bits, torch.dtype) else "")
    integers = not (weight.dtype.is_floating_point or weight.dtype.is_complex)
    return _word(weight.dtype) if weight.is_quantized or integers or weight.dtype.itemsize < 2 else None


def _is_plain(weight: Any) -> bool:
    """Whether it is a parameter of floats without any mark: nearly every weight is, and that is soon told."""
    return (
        type(weight) is nn.Parameter
        and not vars(weight)
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize >= 2
    )


def weight_object(layer: nn.Module, parameter: str = "weight") -> Tensor | None:
    """The stored weight as the layer has it, called if it is a method; None if there is nothing of that name."""
    weight: Any = layer._parameters.get(parameter)
    if weight is None:
        try:
            weight = base_weight(layer, parameter)
        except AttributeError:
            return None
    weight = weight() if callable(weight) else weight
    return weight if isinstance(weight, Tensor) else None


def as_floats(layer: nn.Module, parameter: str = "weight") -> Tensor | None:
    """The stored weight as plain floats, dequantized if it is quantized; None if it cannot be read."""
    with torch.no_grad():
        dense = _dense(layer, weight_object(layer, parameter))
    return dense if dense is not None and dense.is_floating_point() else None


def _dense(layer: nn.Module, weight: Any) -> Tensor | None:
    if weight is None:
        whole = getattr(layer, "dequantize", None)  # a layer that stores its parts itself, and can put them together
        return whole() if callable(whole) else None
    if getattr(weight, "quant_state", None) is not None:
        codes, state = unpacked(weight)
        return cast(Tensor, _bitsandbytes(layer).dequantize_4bit(codes, state))
    if hasattr(weight, "SCB") and weight.dtype == torch.int8:
        scales, floats = row_scales(layer, weight), _bitsandbytes(layer).int8_vectorwise_dequant
        return None if scales is None else cast(Tensor, floats(weight.data, scales))
    if hasattr(weight, "get_original_weight"):
        return cast(Tensor, weight.get_original_weight())
    if weight.is_quantized or type(weight).dequantize is not Tensor.dequantize:
        return cast(Tensor, weight.dequantize())
    if weight.is_floating_point() and weight.dtype.itemsize >= 2:
        return cast(Tensor, weight)
    whole = getattr(layer, "dequantize", None)
    return whole() if callable(whole) else None


def unpacked(weight: Any) -> tuple[Tensor, Any]:
    """The 4-bit codes of a bitsandbytes weight, two in a byte, in the order of the weight, and their state.

    On some CPUs bitsandbytes reorders the codes at the first inference. This undoes it in copies: reading changes
    nothing.
    """
    codes, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        reorder = _bitsandbytes(weight)._convert_weight_packed_for_cpu_inverse
        codes, state = reorder(codes, copy.copy(state))
    return codes, state


def row_scales(layer: nn.Module, weight: Any) -> Tensor | None:
    """The scales of an 8-bit bitsandbytes weight; the first call moves them from the weight to the layer's state."""
    scales = weight.SCB
    return getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales


def stored_tensors(layer: nn.Module, parameter: str) -> tuple[Tensor, ...]:
    """The plain tensors that hold the weight, to take a fingerprint of: the weight itself, or what it is made of."""
    weight = weight_object(layer, parameter)
    if _is_plain(weight):
        return (cast(Tensor, weight),)
    if weight is None:  # its parts lie under names of the layer's own
        state = layer.state_dict()
        own = [key for key in state if not key.startswith("lora.") and key != "bias"]
        return tuple(part for key in own for part in _parts(state[key]))
    if getattr(weight, "quant_state", None) is not None:
        # The codes alone: bitsandbytes rounds their scales when it reorders them, and back.
        return (unpacked(weight)[0].reshape(-1),)
    if hasattr(weight, "SCB") and weight.dtype == torch.int8:
        scales = row_scales(layer, weight)
        return (weight.data,) if scales is None else (weight.data, scales)
    return tuple(_parts(weight))


def _parts(value: Any) -> Iterator[Tensor]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _parts(entry)
    elif isinstance(value, Tensor):
        value = value.detach()
        if value.is_quantized:
            yield value.int_repr()
            if value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
                yield value.q_per_channel_scales()
            else:
                yield torch.tensor([value.q_scale()])
        elif scheme_of(value) is not None and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _parts(getattr(value, name))
        else:
            yield value


def called(layer: nn.Module) -> str:
    """What an error calls a layer that it knows no name of."""
    cls = type(layer)
    sizes = [getattr(layer, size, None) for size in ("in_features", "out_features")]
    return f"a {cls.__module__}.{cls.__qualname__}" + (f" ({sizes[0]} to {sizes[1]})" if None not in sizes else "")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bitsandbytes(owner: Any) -> Any:
    """The functions of the library that made this weight or layer."""
    functions = sys.modules.get("bitsandbytes.functional")
    if functions is None:
        raise LorakitError(f"a {type(owner).__name__} is stored as bitsandbytes does, which is not imported: import it")
    return functions
