"""One weight of an adapter as a value: its entry, its variant and its tensors."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.header import WeightEntry
from lorakit.layers import accumulation_dtype
from lorakit.variants import LoRA, Variant

UNRESOLVED = frozenset({"peft: parameter", "peft: addend", "peft: base"})
"""In the place of a kind: what PEFT's file holds there, whose meaning only the live model tells. The factors of a
parameter in PEFT's layout, what is added to a bias, and a weight of the base that was saved along."""
LOOKUPS = frozenset({"Embedding", "EmbeddingBag", "ReadEmbedding"})
"""The kinds whose inputs are indices, by the names of their classes."""


class AdapterWeight(NamedTuple):
    """One weight of an adapter and its tensors."""

    entry: WeightEntry
    variant: Variant
    tensors: Mapping[str, Tensor]
    """By the names of `variant.file_names`: "A" and "B" of LoRA, in the shapes in which layers store them."""

    @property
    def name(self) -> str:
        """The weight's full name, as the file has it."""
        return self.entry.name

    @property
    def lookup(self) -> bool:
        """Whether it is a table of vectors, looked up by index."""
        return self.entry.kind in LOOKUPS

    @property
    def stacked(self) -> bool:
        """Whether the tensors have an axis before those of a matrix: (E, r, k) and (E, d, r) of a stack of E."""
        if self.entry.slices or self.entry.kind not in (None, "Parameter"):
            return bool(self.entry.slices)
        A, B = self.tensors.get("A"), self.tensors.get("B")
        if A is None or B is None or A.dim() != 3 or B.dim() != 3:
            return False
        if self.entry.kind is not None:
            return True  # of a parameter that is no stack, both factors are matrices
        fields = self.variant.peft_fields()
        of_kernel = A.shape[0] == B.shape[1] == fields.get("r", fields.get("init_r")) and B.shape[2] == 1  # one axis
        return not of_kernel and A.shape[0] == B.shape[0] and A.shape[1] == B.shape[2]

    def product(self) -> tuple[Tensor, Tensor]:
        """ΔW = B·A as matrices with the scale in B: (d, r) and (r, k), (E, d, r) and (E, r, k) of a stack.

        Raises:
            LorakitError: ΔW is no product of two thin factors.
        """
        if self.entry.kind in UNRESOLVED:
            raise LorakitError(
                f"{self.name!r} has a meaning in the live model alone: renamed_for(adapter, model) first"
            )
        found = self.variant.product(self.tensors, 2 if self.stacked else 1)
        if found is None:
            variant = self.variant
            raise LorakitError(f"{self.name!r}: {type(variant).__name__} {variant.no_product}; merge it instead")
        return found

    def update(self) -> tuple[Tensor, Tensor]:
        """As `product`, in at least 32 bits, and without what the factors hold of a column that no update changes."""
        B, A = (factor.to(accumulation_dtype(factor.dtype)) for factor in self.product())
        padding = self.entry.padding_idx
        if padding is not None:
            if not -A.shape[-1] <= padding < A.shape[-1]:
                raise LorakitError(f"{self.name!r}: padding_idx={padding} is none of its {A.shape[-1]} columns")
            A = A.index_fill(-1, torch.tensor(padding, device=A.device), 0.0)
        return B, A

    def with_factors(self, B: Tensor, A: Tensor) -> "AdapterWeight":
        """The same weight with ΔW = B·A, given as matrices, as LoRA with a scale of 1."""
        inner = 2 if self.stacked else 1
        old_A, old_B = self.tensors.get("A"), self.tensors.get("B")
        if old_A is not None and old_B is not None:  # in the layer's own axes
            A = A.reshape(*A.shape[:inner], *old_A.shape[inner:])
            B = B.reshape(*B.shape[: inner + 1], *old_B.shape[inner + 1 :])
        return self._replace(variant=LoRA(rank=B.shape[inner]), tensors={"A": A, "B": B})


def incomplete(weight: AdapterWeight) -> str | None:
    """What a weight lacks, or what of it does not fit together."""
    missing = weight.variant.incomplete(weight.tensors)
    if missing is not None:
        return f"{weight.name!r} lacks {missing}"
    for name, tensor in weight.tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            return f"{weight.name!r}: {name} is of dtype {tensor.dtype}; floats of 16 bits or more are needed"
        if not tensor.numel():
            return f"{weight.name!r}: {name} of shape {tuple(tensor.shape)} is empty"
    return _misfit(weight)


def _misfit(weight: AdapterWeight) -> str | None:
    """What is wrong with the shapes of two factors, if it has two."""
    A, B = weight.tensors.get("A"), weight.tensors.get("B")
    if A is None or B is None:
        return None
    fields, inner = weight.variant.peft_fields(), 2 if weight.stacked else 1
    rank, shapes = fields.get("r", fields.get("init_r")), f"A {tuple(A.shape)}, B {tuple(B.shape)}"
    if A.dim() <= inner or B.dim() <= inner:
        return f"{weight.name!r}: {shapes}: a factor is no matrix"
    if weight.entry.kind in UNRESOLVED:
        return None if A.shape[0] == B.shape[1] else f"{weight.name!r}: {shapes} are no two factors of one rank"
    if inner == 2 and A.shape[0] != B.shape[0]:
        return f"{weight.name!r}: {shapes} are of stacks of two sizes"
    if not A.shape[inner - 1] == B.shape[inner] == rank or math.prod(B.shape[inner + 1 :]) != 1:
        return f"{weight.name!r}: {shapes} are no two factors of rank {rank}"
    E = weight.tensors.get("E")
    if E is not None and E.shape != (*A.shape[: inner - 1], rank, 1):
        return f"{weight.name!r}: {shapes} and E {tuple(E.shape)} are no decomposition of rank {rank}"
    return None
