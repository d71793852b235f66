"""How a weight of an adapter is seen as a matrix, where there is no layer to ask: from its entry and from shapes."""

from dataclasses import replace

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.layers import (
    PROJECTIONS,
    Bilinear,
    Convolution,
    Embedding,
    EmbeddingBag,
    Kind,
    Linear,
    Parameter,
    ReadEmbedding,
    Slices,
    TransposedConvolution,
    TransposedLinear,
)
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Variant


def kind_of(weight: AdapterWeight, shape: tuple[int, ...]) -> Kind:
    """How the base tensor of this shape is seen as the matrix that this update changes.

    An update built for that view must have tensors of the very shapes that the adapter holds. Where the adapter does
    not say the kind, the first that fits is it: a square weight is then taken for `nn.Linear`'s (out, in). What holds
    whole weights or rows (`Full`, `Rows`) fits every view, and does not depend on it.

    Args:
        weight: a weight of an adapter, of any variant.
        shape: that of the base's tensor, as a checkpoint holds it.

    Raises:
        LorakitError: no view of such a tensor fits the adapter's tensors; the message has all shapes.
    """
    variant = replace(weight.variant, **{"dropout": 0.0}) if getattr(weight.variant, "dropout", 0) else weight.variant
    padding = weight.entry.padding_idx
    if padding is not None and (isinstance(padding, bool) or not shape or not -shape[0] <= padding < shape[0]):
        raise LorakitError(f"{weight.name!r}: padding_idx={padding!r} is none of the rows of {tuple(shape)}")
    held = {name: tuple(tensor.shape) for name, tensor in weight.tensors.items()}
    why: list[str] = []
    for kind in _candidates(weight, tuple(shape)):
        try:
            wanted = _saved_shapes(kind, variant, tuple(shape))
        except (LorakitError, IndexError, ValueError, RuntimeError) as error:  # a view that such a shape does not have
            why.append(f"{type(kind).__name__}: {str(error).splitlines()[0]}")
            continue
        if wanted == held:
            return kind
        why.append(f"{type(kind).__name__} has {_listed(wanted)}")
    raise LorakitError(
        f"{weight.name!r}: {_listed(held)} of {type(variant).__name__} fit no weight of shape {tuple(shape)}: "
        + ("; ".join(why) or f"kind {weight.entry.kind!r} is not known here for such a shape")
    )


def matrix_of(weight: AdapterWeight, W: Tensor) -> Tensor:
    """The base's tensor as the matrix that this update changes, (d, k) or (E, d, k) of a stack: a view if possible.

    Raises:
        LorakitError: it does not fit.
    """
    return kind_of(weight, tuple(W.shape)).matrix_of(W)


def _candidates(weight: AdapterWeight, shape: tuple[int, ...]) -> list[Kind]:
    """The kinds that it may be, the likeliest first."""
    entry = weight.entry
    name, own = entry.kind, entry.parameter
    if entry.slices:
        names = _all_slices(weight, shape)
        return [Slices(own, names=names, slices=entry.slices)] if names else []
    axes = len(shape)
    found: list[Kind] = []
    if axes == 2:
        found += [Linear(own), TransposedLinear(own)]
        found += [table(entry.padding_idx) for table in (Embedding, EmbeddingBag, ReadEmbedding) if name is not None]
    if 3 <= axes <= 5:
        found.append(Convolution(own))
    if axes == 3:
        found.append(Bilinear(own))
    if axes >= 2:
        found += [Parameter(own), *([Parameter(own, flat=True)] if axes == 3 else [])]
    if 3 <= axes <= 5 and name in (None, "TransposedConvolution"):
        found += [TransposedConvolution(groups, own) for groups in _divisors(shape[0])]
    # PEFT says of all layers at once that they are transposed, of which some may not be.
    also = {"Foreign": "Linear", "TransposedLinear": "Linear" if entry.shape is None else ""}.get(name or "", "")
    said = [kind for kind in found if name in (None, type(kind).__name__)]
    return said + [kind for kind in found if type(kind).__name__ == also]


def _all_slices(weight: AdapterWeight, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The names of all slices, of which a file holds those that were adapted; empty if they cannot be known."""
    chosen = weight.entry.slices
    if tuple(name for name in PROJECTIONS if name in chosen) == chosen:
        return PROJECTIONS if shape and shape[0] % len(PROJECTIONS) == 0 else ()
    B = weight.tensors.get("B")
    complete = B is not None and B.dim() == 3 and shape and B.shape[1] * len(chosen) == shape[0]
    return chosen if complete else ()


def _divisors(number: int) -> list[int]:
    low = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*low, *(number // i for i in low)})


def _saved_shapes(kind: Kind, variant: Variant, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes that an update of this variant has in a file, by a sketch without values."""
    sketch = torch.empty(shape, device="meta")
    update = variant.fit([kind.matrix_shape(sketch)]).build(kind, sketch, "weight")
    return {name: tuple(tensor.shape) for name, tensor in update.saved().items()}


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
