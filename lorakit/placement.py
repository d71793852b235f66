"""How a weight is seen as a matrix where there is no layer to ask: from what a file says of it, and from shapes."""

import math

import torch

from lorakit.adapter import LOOKUPS, AdapterWeight
from lorakit.errors import LorakitError
from lorakit.layers import (
    Bilinear,
    Convolution,
    Embedding,
    Kind,
    Linear,
    Parameter,
    Slices,
    TransposedConvolution,
    TransposedLinear,
)
from lorakit.layers.attention import PROJECTIONS

_SIMPLE: dict[str, type[Linear] | type[TransposedLinear] | type[Convolution] | type[Bilinear]] = {
    "Linear": Linear,
    "Foreign": Linear,
    "TransposedLinear": TransposedLinear,
    "Convolution": Convolution,
    "Bilinear": Bilinear,
}


def kind_of(weight: AdapterWeight, shape: tuple[int, ...]) -> Kind:
    """The kind of a weight of this shape that an adapter's tensors fit.

    Raises:
        LorakitError: they fit none.
    """
    entry, name = weight.entry, weight.entry.kind
    if entry.slices:
        if not set(entry.slices) <= set(PROJECTIONS) or len(shape) != 2:
            raise LorakitError(f"{weight.name!r}: slices {', '.join(entry.slices)} of a weight of shape {shape}")
        return Slices(entry.parameter, PROJECTIONS, entry.slices)
    if name in LOOKUPS:
        return Embedding(entry.padding_idx)
    if name == "TransposedConvolution":
        return TransposedConvolution(_groups(weight, shape), entry.parameter)
    if name in _SIMPLE:
        return _SIMPLE[name](entry.parameter)
    if name == "Parameter":
        return Parameter(entry.parameter, flat=len(shape) == 3 and not weight.stacked)
    return _by_shapes(weight, shape)


def _by_shapes(weight: AdapterWeight, shape: tuple[int, ...]) -> Kind:
    """The kind that factors fit, where the file does not say: of a square matrix it is that of a linear layer."""
    parameter, A, B = weight.entry.parameter, weight.tensors.get("A"), weight.tensors.get("B")
    if A is None or B is None:
        return Linear(parameter) if len(shape) == 2 else Parameter(parameter, flat=True)
    outline = torch.empty(shape, device="meta")
    rank = A.shape[1] if weight.stacked else A.shape[0]
    candidates: list[Kind] = [Linear(parameter), TransposedLinear(parameter)]
    if len(shape) > 2:
        groups = shape[0] // A.shape[1] if A.dim() == len(shape) and A.shape[1] else 1
        candidates = [Convolution(parameter), TransposedConvolution(max(groups, 1), parameter)]
        candidates += [Parameter(parameter, flat=True), Parameter(parameter)]
    for kind in candidates if len(shape) > 1 else ():
        try:
            if kind.factor_shapes(outline, rank) == (tuple(A.shape), tuple(B.shape)):
                return kind
        except (
            LorakitError,
            RuntimeError,
        ):  # a rank above that of one matrix; sizes that are no multiple of the groups
            continue
    raise LorakitError(
        f"{weight.name!r}: A {tuple(A.shape)} and B {tuple(B.shape)} fit no weight of shape {shape}; is this the base?"
    )


def _groups(weight: AdapterWeight, shape: tuple[int, ...]) -> int:
    """The groups of a transposed convolution: each has in/groups·kernel columns."""
    A, whole = weight.tensors.get("A", weight.tensors.get("A1")), math.prod(shape) // shape[1]
    if A is None:  # a Kronecker product
        parts = {key: tensor for key, tensor in weight.tensors.items() if key in ("w1", "w1_b", "w2", "w2_b")}
        columns = math.prod(math.prod(tensor.shape[1:]) for tensor in parts.values())
    else:
        columns = math.prod(A.shape[1:])
    if not columns or whole % columns:
        raise LorakitError(f"{weight.name!r}: {columns} columns fit no transposed convolution of shape {shape}")
    return whole // columns
