"""Where an update sits: one small file per kind of layer. Nothing here knows what is trained."""

from lorakit.layers import attention, recurrent, transformer  # noqa: F401
from lorakit.layers.adapters import AdaptedWeight, Adapters, Mode, Update
from lorakit.layers.attention import PROJECTIONS
from lorakit.layers.bilinear import Bilinear
from lorakit.layers.choice import RowChoice, Selection, scalar
from lorakit.layers.convolution import Convolution, TransposedConvolution
from lorakit.layers.embedding import Embedding, EmbeddingBag, ReadEmbedding
from lorakit.layers.foreign import Foreign, as_foreign, check_read, dense_weight, outline, stored_dtype
from lorakit.layers.install import adapters_of, check_changeable, install, uninstall
from lorakit.layers.kind import (
    CalledKind,
    Inputs,
    Kind,
    LastAxisKind,
    Parts,
    VectorKind,
    accumulation_dtype,
    attribute,
    base_weight,
    in_dtype,
    kinds_of,
    parameter_names,
    parts_of,
    register_kind,
    register_late,
    register_parts,
)
from lorakit.layers.linear import Linear
from lorakit.layers.parameter import Parameter
from lorakit.layers.requantize import Requantized, plain_linear, replace_layer, requantized
from lorakit.layers.slices import Slices
from lorakit.layers.stored import scheme_of, stored_tensors
from lorakit.layers.thin import Strength, Term
from lorakit.layers.transposed import TransposedLinear

KINDS: tuple[type[Kind], ...] = (
    Linear,
    TransposedLinear,
    Foreign,
    Convolution,
    TransposedConvolution,
    Embedding,
    EmbeddingBag,
    ReadEmbedding,
    Bilinear,
    Parameter,
    Slices,
)
"""Every kind, in the order in which tables name them."""

__all__ = [
    "KINDS",
    "PROJECTIONS",
    "AdaptedWeight",
    "Adapters",
    "Bilinear",
    "CalledKind",
    "Convolution",
    "Embedding",
    "EmbeddingBag",
    "Foreign",
    "Inputs",
    "Kind",
    "LastAxisKind",
    "Linear",
    "Mode",
    "Parameter",
    "Parts",
    "ReadEmbedding",
    "Requantized",
    "RowChoice",
    "Selection",
    "Slices",
    "Strength",
    "Term",
    "TransposedConvolution",
    "TransposedLinear",
    "Update",
    "VectorKind",
    "accumulation_dtype",
    "adapters_of",
    "as_foreign",
    "attribute",
    "base_weight",
    "check_changeable",
    "check_read",
    "dense_weight",
    "in_dtype",
    "install",
    "kinds_of",
    "outline",
    "parameter_names",
    "parts_of",
    "plain_linear",
    "register_kind",
    "register_late",
    "register_parts",
    "replace_layer",
    "requantized",
    "scalar",
    "scheme_of",
    "stored_dtype",
    "stored_tensors",
    "uninstall",
]
