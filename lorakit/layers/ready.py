"""Few rows: what a call of a linear layer needs, found once and not at every call.

For ten vectors, or one in decoding, the arithmetic is little and finding the update is much: which adapters act, which
factors they have, and views of them the other way round. While one adapter acts, through two factors that are tensors
of its own, this is kept until something of it changes.
"""

from operator import attrgetter
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.layers.adapters import AdaptedWeight, Update
from lorakit.layers.thin import MANY, add_few

NUMBERS = attrgetter("scale", "dropout")
"""What the term of an update depends on beside its tensors, if it says so."""


def owner_of(update: Update, name: str, tensor: Tensor) -> dict[str, Any] | None:
    """The mapping of the update that holds this very tensor; None if it is computed at every call."""
    held: tuple[dict[str, Any], ...] = (update._parameters, update._buffers)
    return next((owner for owner in held if owner.get(name) is tensor), None)


@final
class Ready:
    """The one term that acts on a weight now, or that there is none to keep."""

    __slots__ = ("A", "At", "B", "Bt", "acting", "at", "numbers", "owner_A", "owner_B", "scale", "update")

    def __init__(self, adapted: AdaptedWeight) -> None:
        self.acting = adapted.selection.acting
        self.A: Tensor | None = None
        acting = adapted.acting() if self.acting is not None else []
        chosen = [name for name, _ in adapted.selection.active if name in adapted]
        if len(acting) != 1 or len(chosen) != 1:  # one that is not enabled may be enabled later
            return
        self.update, strength = acting[0]
        term = self.update.term(strength)
        if term is None or not hasattr(self.update, "scale") or not hasattr(self.update, "dropout"):
            return
        self.numbers = NUMBERS(self.update)
        if self.numbers[1] > 0:  # it drops in training only, and modes change
            return
        A, B, scale, _ = term
        owners = [owner_of(self.update, "A", A), owner_of(self.update, "B", B)]
        if None in owners or isinstance(scale, Tensor):  # factors that are computed at every call
            return
        self.owner_A, self.owner_B = owners
        self.A, self.B, self.scale, self.at = A, B, scale, (A.data_ptr(), B.data_ptr())
        with torch.inference_mode(False), torch.no_grad():
            self.At, self.Bt = A.t(), B.t()

    def holds(self, adapted: AdaptedWeight) -> bool:
        """Whether all is as it was found; values may have changed, the views see that."""
        if self.acting is not adapted.selection.acting:
            return False
        A = self.A
        return A is None or (
            self.update.enabled
            and self.owner_A["A"] is A  # type: ignore[index]
            and self.owner_B["B"] is self.B  # type: ignore[index]
            and (A.data_ptr(), self.B.data_ptr()) == self.at
            and NUMBERS(self.update) == self.numbers
        )

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ for few rows x: (..., k); None if it is not for these."""
        A = self.A
        if A is None or x.dtype != A.dtype or x.numel() >= MANY * x.shape[-1] or A.is_meta != x.is_meta:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or self.B.requires_grad):
            return add_few(F.linear(x, weight, bias), x, A, self.B, self.scale)
        shape = None if x.dim() == 2 else x.shape
        rows = x if shape is None else x.reshape(-1, shape[-1])
        y = F.linear(rows, weight, bias)
        if self.scale == 1:
            y.addmm_(torch.mm(rows, self.At), self.Bt)
        else:
            y.addmm_(torch.mm(rows, self.At), self.Bt, alpha=self.scale)
        return y if shape is None else y.view(*shape[:-1], y.shape[-1])
