"""The two shapes that most updates have: s·B·A of two factors, and a dense ΔW."""

from abc import abstractmethod
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Inputs, Kind, Mode, Strength, Term, Update, VectorKind, in_dtype, outline, scalar


def check_dropout(dropout: float, kind: Kind, mode: Mode) -> None:
    """Whether dropout can act there: it needs an input that is numbers."""
    if dropout > 0 and mode == "weight":
        raise LorakitError(
            f"dropout={dropout} acts on the input of a call and cannot be expressed in the weight; "
            "use dropout=0, or adapt the layer itself, beside its call (mode='beside')"
        )
    if dropout > 0 and kind.lookup:
        raise LorakitError(
            f"dropout={dropout} acts on numbers, and the input of an {kind.name} is indices; use dropout=0 "
            "there, as an adapter of its own"
        )


class ScaledUpdate(Update):
    """An update with a scale, and with dropout on its input in training."""

    scale: float
    dropout: float
    _scale: Tensor

    def __init__(self, kind: Kind, mode: Mode, scale: float, dropout: float) -> None:
        super().__init__()
        check_dropout(dropout, kind, mode)
        # _scale: for compiled code, which would be made anew for another float
        vars(self).update(kind=kind, mode=mode, scale=scale, _scale=scalar(scale), dropout=dropout)

    @final
    def scaled(self, strength: Strength) -> Strength:
        """Strength·s, in the kind of number that strength is."""
        return self._scale * strength if isinstance(strength, Tensor) else self.scale * strength

    @final
    def add_product(self, layer: nn.Module, inputs: Inputs, y: Tensor, A: Tensor, B: Tensor, scale: Strength) -> Tensor:
        """Y + scale·B(A(inputs)), with entries of the input dropped in training."""
        kind = cast(CalledKind, self.kind)
        dropout = self.dropout if self.training else 0.0
        if isinstance(kind, VectorKind):
            return kind.add(layer, inputs[0], y, (A, B, scale, dropout))
        return kind.beside(layer, self.dropped(inputs, A.dtype), y, A, B, scale)

    @final
    def dropped(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """The layer's inputs in this dtype, with entries dropped in training."""
        inputs = in_dtype(self.kind, inputs, dtype)
        if self.dropout == 0 or not self.training:
            return inputs
        return (F.dropout(inputs[0], self.dropout), *inputs[1:])

    def extra_repr(self) -> str:
        """Shapes and scale, for `print(model)`."""
        shapes = (f"{name}={tuple(tensor.shape)}" for name, tensor in self.state_dict().items())
        return f"{', '.join(shapes)}, scale={self.scale:g}, mode={self.mode!r}"


class FactoredUpdate(ScaledUpdate):
    """ΔW = s·B·A of two factors, however they come about. Beside the call B·A is never formed."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, in the shapes of `kind.factor_shapes`."""

    @final
    def product(self, weight: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Strength·s·B and A as matrices, (d, r) and (r, k), after the stack's axis if there is one."""
        A, B = self.factors()
        inner, scale = len(self.kind.matrix_shape(weight)) - 1, self.scale * strength
        return (B if scale == 1 else B * scale).flatten(inner), A.flatten(inner)

    @final
    def delta_weight(self, weight: Tensor) -> Tensor:
        """s·B·A."""
        A, B = self.factors()
        return self.kind.delta_weight(weight, A, B if self.scale == 1 else B * self.scale)

    @final
    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·s·B(A(x))."""
        return self.add_product(layer, inputs, y, *self.factors(), self.scaled(strength))

    @final
    def term(self, strength: Strength) -> Term:
        """A, B, strength·s and the dropout that acts now."""
        return (*self.factors(), self.scaled(strength), self.dropout if self.training else 0.0)


class DenseUpdate(Update):
    """ΔW as a matrix of any make. Beside the call, the layer is called once more, with ΔW for its weight."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """ΔW as a matrix, (d, k), or (E, d, k) of a stack."""

    @final
    def delta_weight(self, weight: Tensor) -> Tensor:
        """The matrix in the weight's shape."""
        return self.kind.weight_of(self.matrix(), weight)

    @final
    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·(the layer with ΔW for its weight)."""
        kind = cast(CalledKind, self.kind)
        delta = kind.weight_of(self.matrix(), outline(layer, kind))
        update = kind.call(layer, in_dtype(kind, inputs, delta.dtype), y, delta)
        return y + (update * strength).to(y.dtype)
