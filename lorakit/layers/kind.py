"""What a kind of layer is: how its weight is seen as a d×k matrix, and how a low-rank update acts on it.

A kind knows nothing of what is trained. It takes two factors, A and B, and says how they change the layer; every
variant is built from that. To add a kind, write one file: a final class below, registered by type with `register_kind`.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers.thin import Strength, Term, add_thin_product

Inputs = tuple[Any, ...]
"""What a layer is called with, in the order of its forward's arguments."""


class Kind(ABC):
    """One weight of a layer, seen as a matrix of d rows (outputs) and k columns (inputs), or as a stack of them.

    A kind that is only this is *read*: the layer's owner takes the weight from its attribute, and an update can act
    in the weight alone.
    """

    name: ClassVar[str]
    """What `plan` calls it."""
    parameter: str
    """The name of the adapted parameter on its layer."""
    is_linear: bool
    """Whether `targets="all-linear"` selects it."""
    slices: tuple[str, ...] = ()
    """The names of the slices of the parameter that it changes; empty if it is not about slices."""
    lookup: ClassVar[bool] = False
    """Whether inputs are indices of columns. A then begins at zero and B at random: what is never looked up stays."""
    padding_idx: int | None = None
    """The column that no update changes."""

    @abstractmethod
    def matrix_shape(self, weight: Tensor) -> tuple[int, ...]:
        """(d, k) of the weight seen as a matrix; (E, d, k) if it is a stack of E matrices."""

    @abstractmethod
    def factor_shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B, as they are stored and trained: (r, k) and (d, r), with the layer's own axes."""

    @abstractmethod
    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight as a matrix, of shape `matrix_shape`."""

    @abstractmethod
    def weight_of(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """A change given as a matrix, in the weight's own shape and zero where nothing may change.

        `weight` gives the shape and is not read.
        """

    @final
    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B·A in the weight's own shape; `weight` gives the shape and is not read."""
        inner = len(self.matrix_shape(weight)) - 1
        return self.weight_of(B.flatten(inner) @ A.flatten(inner), weight)


class CalledKind(Kind):
    """A layer that is *called*: an update can also sit beside the call and never form B·A."""

    arguments: ClassVar[tuple[str, ...]] = ()
    """The names of forward's arguments, if what is beside the call needs more than the first."""
    takes: ClassVar[Literal["vectors", "indices", "other"]] = "other"
    """What the first input is, if nothing else is done with it: vectors (..., k) that the matrix is applied to, or
    indices (...) of its columns, of which each is returned."""
    may_sever: ClassVar[bool] = False
    """Whether such a layer may give no gradient to its input; then it is watched for that."""

    @abstractmethod
    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·B(A(inputs)) for the layer's inputs and output y.

        `inputs[0]` is in A's dtype, unless it holds indices or the kind takes vectors; the result is in y's.
        """

    @abstractmethod
    def call(self, layer: nn.Module, inputs: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """What the layer would return with this weight and no bias; inputs as for `beside`, y gives the size."""

    @abstractmethod
    def has_rows(self, layer: nn.Module, y: Tensor) -> bool:
        """Whether the first axis of the output y is the batch's, and so that of the inputs."""

    @abstractmethod
    def scale_rows(self, layer: nn.Module, inputs: Inputs, y: Tensor, factor: Tensor) -> Tensor:
        """The output y with each row of the matrix multiplied by its factor, (d,), and the bias as it is.

        In the wider of their dtypes; a factor of 1 changes no bit.
        """


class LastAxisKind(CalledKind):
    """A called layer whose outputs are the last axis of what it returns."""

    @final
    def has_rows(self, layer: nn.Module, y: Tensor) -> bool:
        """Unless y is a single vector."""
        return y.dim() > 1

    @final
    def scale_rows(self, layer: nn.Module, inputs: Inputs, y: Tensor, factor: Tensor) -> Tensor:
        """Y·factor + (1 − factor)·bias along the last axis."""
        bias: Any = getattr(layer, "bias", None)
        bias = bias() if callable(bias) else bias  # a method of some quantized layers
        return rescaled(y, factor, bias)


class VectorKind(LastAxisKind, ABC):
    """A layer that is called with vectors (..., k) and applies its matrix to each, and nothing else but a bias."""

    takes: ClassVar[Literal["vectors", "indices", "other"]] = "vectors"

    @abstractmethod
    def check(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Whether the layer's input and output are of the sizes it says; nothing where torch has checked that."""

    @final
    def add(self, layer: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
        """Y and what the term adds to it, x and A in any dtypes."""
        self.check(layer, x, y)
        return add_thin_product(y, x, term)

    @final
    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·(x·Aᵀ)·Bᵀ; x: (..., k), y: (..., d)."""
        return self.add(layer, inputs[0], y, (A, B, scale, 0.0))


def rescaled(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Y·factor + (1 − factor)·bias, in one pass over y; factor and bias laid out to broadcast."""
    y = y.to(torch.promote_types(y.dtype, factor.dtype))
    if bias is None:
        return y * factor
    return torch.addcmul((1 - factor) * bias.to(y.dtype), y, factor)


def in_dtype(kind: Kind, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with the first in this dtype, unless it holds indices."""
    return inputs if kind.lookup else (inputs[0].to(dtype), *inputs[1:])


Kinds = Kind | tuple[Kind, ...] | None
"""What a registered function may return: one weight, several, or none."""


@singledispatch
def _kinds(layer: nn.Module) -> Kinds:
    return None


register_kind = _kinds.register
"""Decorates a function (layer) -> Kinds; the type of its argument is the type of layer that it is for."""

_late: dict[tuple[str, str], Callable[[Any], Kinds]] = {}


def register_late(module: str, name: str) -> Callable[[Callable[[Any], Kinds]], Callable[[Any], Kinds]]:
    """`register_kind` for a type of a library that is not imported for it: only once someone else has."""

    def decorate(function: Callable[[Any], Kinds]) -> Callable[[Any], Kinds]:
        _late[module, name] = function
        return function

    return decorate


def kinds_of(layer: nn.Module) -> tuple[Kind, ...]:
    """What can be adapted of a layer as a whole, by its type; empty if it has no weight of its own that is known here.

    Only its parameters can then be adapted, each by name (`layers.Parameter`).
    """
    for module, name in [key for key in _late if key[0] in sys.modules]:
        cls = getattr(sys.modules[module], name, None)
        if cls is not None:  # it is None while that module is still being imported
            _kinds.register(cls, _late.pop((module, name)))
    if isinstance(layer, torch.jit.ScriptModule):
        return ()  # its type is lost, and its compiled code sees no hook and no computed weight
    found = _kinds(layer)
    return () if found is None else found if isinstance(found, tuple) else (found,)


@dataclass(frozen=True)
class Parts:
    """Children that make a layer whole."""

    named: tuple[str, ...] = ()
    """Naming the layer names their weights too."""
    read: tuple[str, ...] = ()
    """The layer's own code reads their weights, on some of its paths at least: they are adapted in the weight."""


@singledispatch
def parts_of(layer: nn.Module) -> Parts:
    """The parts of a layer, by its type."""
    return Parts()


register_parts = parts_of.register
"""Decorates a function (layer) -> Parts; the type of its argument is the type of layer that it is for."""


def attribute(module: nn.Module, name: str, default: Any = None) -> Any:
    """`getattr(module, name, default)`, where most modules have nothing of that name: failing, torch's is slow."""
    cls, own = type(module), vars(module)
    if cls.__getattr__ is not nn.Module.__getattr__ or hasattr(cls, name):
        return getattr(module, name, default)
    for held in (own, own["_parameters"], own["_buffers"], own["_modules"]):
        if name in held:
            return held[name]
    return default


def parameter_names(layer: nn.Module) -> Iterator[str]:
    """The names of a layer's own parameters, also of those that torch's parametrizations compute."""
    yield from (name for name, parameter in layer._parameters.items() if parameter is not None)
    if "parametrizations" in layer._modules:  # by torch: the parameter is a property of the class
        yield from cast(nn.Module, layer._modules["parametrizations"])._modules


def base_weight(layer: nn.Module, parameter: str) -> Tensor:
    """The frozen weight itself, past any update."""
    weight = layer._parameters.get(parameter)
    if weight is not None:
        return weight
    # Not a plain parameter: a property of the layer's own class, by torch's parametrize for instance.
    for owner in type(layer).__mro__:
        if parameter in vars(owner).get("_read_by_lorakit", ()):
            return cast(Tensor, getattr(super(owner, layer), parameter))
    return cast(Tensor, getattr(layer, parameter))


STAND_INS: set[Any] = set()
"""The functions here that take the place of a layer's forward while it is adapted."""


def runs_its_own_forward(layer: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling the layer does something else than torch's forward of one of these classes.

    s·BA then belongs into whatever it computes from its weight. Accelerate's forward, which moves weights between
    devices, is marked as such and computes the same.
    """
    own = vars(layer).get("forward")
    patched = own is not None and not hasattr(layer, "_hf_hook") and getattr(own, "func", None) not in STAND_INS
    return patched or type(layer).forward not in [cls.forward for cls in classes]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which updates are held and sums with a weight of `dtype` are formed: at least 32 bits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def stack_factor_shapes(
    shape: tuple[int, int, int], rank: int, what: str
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes (E, r, k) of A and (E, d, r) of B for a stack (E, d, k), each matrix with an update of its own.

    Raises:
        LorakitError: a rank above that of one matrix; `what` says what the stack is.
    """
    count, d, k = shape
    if rank > min(d, k):
        raise LorakitError(
            f"rank {rank} is larger than the slice: {what} of {d}×{k}, each with an update of its own; use a rank of "
            f"at most {min(d, k)}, or leave this weight out"
        )
    return (count, rank, k), (count, d, rank)


def flat_shape(weight: Tensor) -> tuple[int, int]:
    """(d, k) of a weight whose first axis is the output: every other axis belongs to the input."""
    d, *rest = weight.shape
    return d, rest[0] if len(rest) == 1 else math.prod(rest)


def flat_factor_shapes(weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes (r, k) of A and (d, r) of B for such a weight."""
    d, k = flat_shape(weight)
    return (rank, k), (d, rank)
