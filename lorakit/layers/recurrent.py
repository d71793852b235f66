"""Recurrent layers and cells: every matrix of theirs is read by one kernel, so every update acts in the weight.

`weight_ih_l0` (gates·H, in), `weight_hh_l0` (gates·H, H or proj), of a projected LSTM `weight_hr_l0` (proj, H), and so
for each further layer and for the reverse direction; of a cell `weight_ih` and `weight_hh`.
"""

from torch import nn

from lorakit.layers.kind import Kind, parameter_names, register_kind
from lorakit.layers.parameter import Parameter


@register_kind
def _(layer: nn.RNNBase) -> tuple[Kind, ...]:
    used = set(layer._flat_weights_names)  # torch's own list of what it hands to the kernel
    return tuple(Parameter(name) for name in parameter_names(layer) if name in used and name.startswith("weight"))


@register_kind
def _(layer: nn.RNNCellBase) -> tuple[Kind, ...]:
    return tuple(Parameter(name) for name in parameter_names(layer) if name in ("weight_ih", "weight_hh"))
