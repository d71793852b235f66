"""Where an update sits: one small file per kind of layer. Nothing here knows what is trained."""

from lorakit.layers.adapters import AdaptedWeight, Adapters, Mode, Selection, Update
from lorakit.layers.install import adapters_of, base_weight, check_changeable, install, uninstall
from lorakit.layers.kind import CalledKind, Kind, accumulation_dtype, kind_of
from lorakit.layers.linear import Linear
from lorakit.layers.parameter import Parameter

__all__ = [
    "AdaptedWeight",
    "Adapters",
    "CalledKind",
    "Kind",
    "Linear",
    "Mode",
    "Parameter",
    "Selection",
    "Update",
    "accumulation_dtype",
    "adapters_of",
    "base_weight",
    "check_changeable",
    "install",
    "kind_of",
    "uninstall",
]
