"""Control LoRAs train a bias of B, too: y = W·x + b + s·(B·A·x + c), and b is known to the live model alone.

The value keeps s·c, as a weight of its own, until the model gives b: then it is the bias as a whole, b + s·c.
"""

from collections.abc import Mapping

from torch import Tensor

from lorakit.formats.names import Names
from lorakit.header import WeightEntry
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, LoRA

ADDEND = "addend of a bias"
"""The kind of such a weight, until it has been resolved."""
END = "lora_B.bias"


def is_addend(weight: AdapterWeight) -> bool:
    """Whether it is what is added to a bias, not the bias."""
    return weight.entry.kind == ADDEND


def addends_of(biases: Mapping[str, Tensor], weights: list[AdapterWeight], problems: list[str]) -> list[AdapterWeight]:
    """A weight for each bias of a B, with the scale of that; what is wrong is added to the problems."""
    variants = {weight.entry.path: weight.variant for weight in weights}
    found = []
    for path, bias in biases.items():
        variant = variants.get(path)
        if not isinstance(variant, LoRA) or bias.dim() != 1 or not bias.dtype.is_floating_point:
            problems.append(f"'{path}.{END}' of shape {tuple(bias.shape)}, {bias.dtype}, is no bias of a LoRA's B")
            continue
        value = bias if variant.scale == 1 else bias.float() * variant.scale
        entry = WeightEntry(path, "bias", None, None, None, None, None, (), ADDEND)
        found.append(AdapterWeight(entry, Full(), {"value": value}))
    return found


def with_biases(weights: list[AdapterWeight], names: Names, problems: list[str]) -> list[AdapterWeight]:
    """The weights with the model's biases in the place of what is added to them."""
    if not any(is_addend(weight) for weight in weights):
        return weights
    if names.model is None:
        problems.append(f"it adds to biases ({END}), which only the live model knows: give the model itself")
        return weights
    found = []
    for weight in weights:
        if not is_addend(weight):
            found.append(weight)
            continue
        try:
            bias = names.model.get_submodule(weight.entry.path)._parameters.get("bias")
        except AttributeError:
            problems.append(f"the model has no layer {weight.entry.path!r}")
            continue
        added = weight.tensors["value"]
        if bias is None or bias.is_meta or bias.shape != added.shape:
            has = "no bias" if bias is None else f"one of shape {tuple(bias.shape)} on {bias.device}"
            problems.append(f"{weight.name!r}: the file adds {tuple(added.shape)} to it, and the layer has {has}")
            continue
        value = bias.detach().cpu().float() + added.float()
        found.append(weight._replace(entry=weight.entry._replace(kind=None), tensors={"value": value}))
    return found
