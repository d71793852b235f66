"""`nn.MultiheadAttention`: it reads all its weights and calls nothing, so every update acts in the weight.

The query, key and value projections are one parameter, `in_proj_weight` (3·E, E), where their inputs are of one size;
it is seen as three slices that go by the names they have where the sizes differ and each is a parameter of its own:
`q_proj_weight` (E, E), `k_proj_weight` (E, kdim), `v_proj_weight` (E, vdim). The weight of the output lies in the child
`out_proj`.
"""

from torch import nn

from lorakit.layers.kind import Kind, Parts, parameter_names, register_kind, register_parts
from lorakit.layers.parameter import Parameter
from lorakit.layers.slices import Slices

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@register_kind
def _(layer: nn.MultiheadAttention) -> tuple[Kind, ...]:
    own = set(parameter_names(layer))
    if "in_proj_weight" in own:
        return (Slices("in_proj_weight", names=PROJECTIONS, slices=PROJECTIONS),)
    return tuple(Parameter(name) for name in PROJECTIONS if name in own)


@register_parts
def _(layer: nn.MultiheadAttention) -> Parts:
    return Parts(named=("out_proj",), read=("out_proj",))
