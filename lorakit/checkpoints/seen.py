"""How the weights of a checkpoint are seen as matrices: by the model they are of, else by their names and shapes."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lorakit.checkpoints.checkpoint import Checkpoint
from lorakit.layers import Convolution, Embedding, Foreign, Kind, Linear, Parameter, TransposedLinear, kinds_of

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class Seen(NamedTuple):
    """How one weight is seen."""

    kind: Kind | None
    """None: it is no matrix, and is kept as a whole."""
    by: str
    """What told: "module", "name" or "shape"."""


def seen(checkpoint: Checkpoint, model: nn.Module | None) -> Mapping[str, Seen | str]:
    """How each tensor is seen, or in words why it can be no part of an adapter."""
    known = {} if model is None else _of_model(model)
    turned = transposed(checkpoint)
    return {name: known.get(name) or _by_name(name, checkpoint, turned) for name in checkpoint}


def _of_model(model: nn.Module) -> dict[str, Seen | str]:
    """By the layers of a live model."""
    found: dict[str, Seen | str] = {
        name: "is a buffer, and adapters change parameters" for name, _ in model.named_buffers()
    }
    for path, layer in model.named_modules(remove_duplicate=False):
        kinds = {kind.parameter: kind for kind in kinds_of(layer)}
        for parameter, value in layer._parameters.items():
            if value is not None:
                kind = kinds.get(parameter) or (Parameter(parameter) if value.dim() > 1 else None)
                name = f"{path}.{parameter}" if path else parameter
                found[name] = "is quantized" if isinstance(kind, Foreign) else Seen(kind, "module")
    return found


def _by_name(name: str, checkpoint: Checkpoint, turned: set[str]) -> Seen | str:
    """By the name and the shape. A linear layer's weight is (out, in), which a bias of another size belies."""
    path, _, parameter = name.rpartition(".")
    if parameter in _RUNNING:
        return "is a buffer, and adapters change parameters"
    shape = checkpoint[name].shape
    if len(shape) < 2:
        return Seen(None, "shape")
    if is_embedding(name) and len(shape) == 2:
        return Seen(Embedding(None), "name")
    bias = checkpoint[f"{path}.bias"].shape if f"{path}.bias" in checkpoint and parameter == "weight" else None
    if len(shape) == 2:
        if parameter == "weight" and leaf(path) in turned:
            return Seen(TransposedLinear(), "bias")
        return Seen(Linear(parameter) if parameter == "weight" else Parameter(parameter), "shape")
    if parameter != "weight":
        return Seen(Parameter(parameter), "name")  # three axes are a stack of matrices
    # Of a transposed convolution the groups are not known: it is kept as a whole.
    return Seen(Convolution() if bias in (None, shape[:1]) else None, "name" if len(shape) == 3 else "shape")


def transposed(checkpoint: Checkpoint) -> set[str]:
    """The last names of layers whose weight is (in, out), as GPT-2's: those where a bias has the size of the second."""
    found = set()
    for name in checkpoint:
        path, _, parameter = name.rpartition(".")
        shape = checkpoint[name].shape
        if parameter == "weight" and len(shape) == 2 and f"{path}.bias" in checkpoint:
            bias = checkpoint[f"{path}.bias"].shape
            if bias == shape[1:] and bias != shape[:1]:
                found.add(leaf(path))
    return found


def leaf(path: str) -> str:
    """The last name of a layer."""
    return path.rpartition(".")[2]


def is_embedding(name: str) -> bool:
    """Whether a weight's name is one that look-up tables have."""
    path, _, parameter = name.rpartition(".")
    own = leaf(path).lower()
    table = ("embed" in own and own not in ("embed_out", "unembed")) or own in ("wte", "wpe", "shared", "emb")
    return parameter == "weight" and table
