"""One weight of an adapter as the formats of image models have it, and what they have no place for."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.safe import in_order
from lorakit.storage import all_finite
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, LoHa, LoKr
from lorakit.variants.low_rank import LowRank

Style = Literal["kohya", "peft"]
"""How factors are called: lora_down.weight and lora_up.weight, or lora_A.weight and lora_B.weight."""
_ENDS: Mapping[Style, tuple[str, str]] = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
}
_TRANSPOSED = ("TransposedConvolution",)


def tensors_of(weight: AdapterWeight, style: Style, problems: list[str]) -> tuple[dict[str, Tensor], float] | None:
    """The tensors of one weight by the ends of their keys, and alpha; the scale is alpha over their rank.

    None if the format cannot hold it, which the problems then say.
    """
    entry, variant = weight.entry, weight.variant
    if entry.parameter != "weight" or weight.stacked:
        problems.append(f"{weight.name!r} is no layer's whole weight")
    elif weight.lookup or entry.kind in _TRANSPOSED:
        problems.append(f"{weight.name!r} is a {'table' if weight.lookup else 'transposed convolution'}: no such layer")
    elif entry.groups != 1:
        problems.append(f"{weight.name!r} is a convolution of {entry.groups} groups, which readers take for one of one")
    elif isinstance(variant, LoKr):
        return _kronecker(weight, variant)
    elif isinstance(variant, LoHa):
        return {variant.file_names[name]: tensor for name, tensor in weight.tensors.items()}, _alpha(
            variant.scale, variant.rank, variant.alpha
        )
    else:
        return _low_rank(weight, style, problems)
    return None


def _low_rank(weight: AdapterWeight, style: Style, problems: list[str]) -> tuple[dict[str, Tensor], float] | None:
    variant, tensors = weight.variant, weight.tensors
    if isinstance(variant, LowRank) and tensors.keys() - {"magnitude"} == {"A", "B"}:
        A, B = tensors["A"], tensors["B"]
        given = variant.alpha if variant.scaling == "standard" else None
        same = variant.rank == A.shape[0] and (given is not None or variant.scale == 1)
        alpha = _alpha(variant.scale, A.shape[0], given if same else None)
    else:
        try:
            B, A = weight.product()
        except LorakitError as error:
            problems.append(str(error))
            return None
        alpha, shape = float(A.shape[0]), weight.entry.shape or ()
        if len(shape) > 2:
            A, B = A.reshape(-1, *shape[1:]), B.reshape(*B.shape, *(1 for _ in shape[2:]))
    down, up = _ENDS[style]
    found = {down: A, up: B}
    if isinstance(variant, DoRA):
        m = tensors["magnitude"]
        if style == "kohya":
            found["dora_scale"] = m.reshape(B.shape[0], *(1 for _ in A.shape[1:]))
        else:
            found["lora_magnitude_vector"] = m
    return found, alpha


def _kronecker(weight: AdapterWeight, variant: LoKr) -> tuple[dict[str, Tensor], float]:
    """Of two whole factors nobody reads an alpha: the scale goes into W₁."""
    tensors = dict(weight.tensors)
    if {"w1", "w2"} <= tensors.keys():
        tensors["w1"] = scaled(tensors["w1"], variant.scale)
        alpha = float(variant.rank)
    else:
        alpha = _alpha(variant.scale, variant.rank, variant.alpha)
    return {variant.file_names[name]: tensor for name, tensor in tensors.items()}, alpha


def _alpha(scale: float, rank: int, given: float | None) -> float:
    return float(given) if given is not None else scale * rank


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """The tensor times a scale; one of 16 bits is widened where the product would be rounded."""
    if scale == 1:
        return tensor
    exact = math.frexp(scale)[0] == 0.5  # a power of two, which only shifts the exponent
    product = tensor * scale
    if exact and torch.equal(product / scale, tensor):
        return product
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor of this dtype, or of a wider one if it cannot hold the number."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    return next((made for each in (dtype, torch.float32) if (made := exact.to(each)).to(torch.float64) == exact), exact)


def dropped(adapter: Adapter) -> tuple[str, ...]:
    """What has no place in such a file and changes no output."""
    lost = [f"dropout={d}" for d in {getattr(w.variant, "dropout", 0.0) for w in adapter.weights} if d]
    lost += ["fingerprints of the base"] * any(weight.entry.sample is not None for weight in adapter.weights)
    lost += ["how each weight is adapted"] * any(weight.entry.mode is not None for weight in adapter.weights)
    return tuple(lost)


def safetensors_of(
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    file: str = "pytorch_lora_weights.safetensors",
) -> dict[str, bytes]:
    """The content of one file.

    Raises:
        LorakitError: a tensor has no values, or holds NaN or infinity.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        raise LorakitError(f"{name!r} is not written: it is on 'meta' and has no values")
    bad = [key for key, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise LorakitError(f"{name!r} is not written: NaN or infinity in {', '.join(bad)}")
    # each with memory of its own: identity matrices and tied factors may share it
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    content = in_order(own, metadata={"format": "pt", **metadata})
    return {file: content}
