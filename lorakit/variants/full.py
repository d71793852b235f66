"""Whole weights and rows of them, trained beside low-rank updates: biases, norms, heads, new tokens of an embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Inputs, Kind, Mode, Strength, Update, accumulation_dtype, dense_weight, in_dtype
from lorakit.variants.checks import checked_integer
from lorakit.variants.variant import Variant


@final
@dataclass(frozen=True)
class Full(Variant):
    """The weight itself, trained as a copy: the base keeps its own, and comes back with `disabled`."""

    no_product: ClassVar[str] = "is a whole weight"
    file_names: ClassVar[Mapping[str, str]] = {"value": ""}

    @property
    def reads_weight(self) -> bool:
        """It begins as W."""
        return True

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "FullUpdate":
        """A copy of the weight."""
        return FullUpdate(weight, kind, mode)

    def peft_fields(self) -> dict[str, Any]:
        """LoRA of no layer: PEFT has it beside another method, as modules_to_save."""
        return {"peft_type": "LORA", "r": 1, "lora_alpha": 1}


@final
class FullUpdate(Update):
    """ΔW = V − W.

    Attributes:
        value: V, in W's shape; it begins as W, in float32 if W is of 16 bits or less.
    """

    def __init__(self, weight: Tensor, kind: Kind, mode: Mode) -> None:
        super().__init__()
        self.kind = kind
        self.mode = mode
        self.value = nn.Parameter(weight.detach().to(accumulation_dtype(weight.dtype), copy=True))

    def delta_weight(self, weight: Tensor) -> Tensor:
        """V − W, zero where nothing may change."""
        change = self.value - weight
        if self.kind.padding_idx is None:
            return change
        return self.kind.weight_of(self.kind.matrix_of(change), weight)

    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·(the layer with V − W for its weight)."""
        kind = cast(CalledKind, self.kind)
        delta = self.delta_weight(dense_weight(layer, kind))
        update = kind.call(layer, in_dtype(kind, inputs, delta.dtype), y, delta)
        return y + (update * strength).to(y.dtype)


@final
@dataclass(frozen=True)
class Rows(Variant):
    """Some rows of the weight's first axis, such as those of new tokens in an embedding, trained as copies.

    Args:
        rows: their indices, each once.

    Raises:
        LorakitError: none, a negative one, or one twice.
    """

    rows: tuple[int, ...]

    no_product: ClassVar[str] = "is rows of a weight"
    file_names: ClassVar[Mapping[str, str]] = {"value": "token_adapter.trainable_tokens_delta"}

    def __post_init__(self) -> None:
        rows = tuple(checked_integer("rows", row, at_least=0, at_most=2**40) for row in self.rows)
        if not rows or len(set(rows)) != len(rows):
            raise LorakitError(f"rows={self.rows!r} must be indices, at least one and each once")
        object.__setattr__(self, "rows", rows)

    @property
    def reads_weight(self) -> bool:
        """They begin as W's."""
        return True

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "RowsUpdate":
        """Copies of the rows."""
        if max(self.rows) >= weight.shape[0]:
            raise LorakitError(f"row {max(self.rows)} is none of its {weight.shape[0]} rows; enlarge the weight first")
        if kind.padding_idx in self.rows and kind.padding_idx is not None:
            raise LorakitError(f"row {kind.padding_idx} is the padding, which stays as it is; leave it out")
        return RowsUpdate(weight, self, kind, mode)

    def peft_fields(self) -> dict[str, Any]:
        """LoRA of no layer: PEFT has it beside another method, as trainable_token_indices."""
        return {"peft_type": "LORA", "r": 1, "lora_alpha": 1}


@final
class RowsUpdate(Update):
    """ΔW is V − W in the chosen rows, and zero elsewhere.

    Attributes:
        value: V, (n, ...) of the n rows; it begins as theirs, in float32 if W is of 16 bits or less.
    """

    def __init__(self, weight: Tensor, spec: Rows, kind: Kind, mode: Mode) -> None:
        super().__init__()
        self.kind = kind
        self.mode = mode
        self._spec = spec
        rows = torch.tensor(spec.rows, device=weight.device)
        self.value = nn.Parameter(weight.detach()[rows].to(accumulation_dtype(weight.dtype)))
        self.register_buffer("rows", rows, persistent=False)

    rows: Tensor

    def delta_weight(self, weight: Tensor) -> Tensor:
        """V − W in its rows."""
        change = self.value - weight[self.rows]
        zero = torch.zeros_like(weight, dtype=change.dtype)
        return zero.index_copy(0, self.rows, change)

    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·(the layer with ΔW for its weight); of a plain look-up, without forming that."""
        kind = cast(CalledKind, self.kind)
        weight = dense_weight(layer, kind)
        if kind.takes == "indices":
            found = inputs[0].unsqueeze(-1) == self.rows  # (..., n)
            update = found.to(self.value.dtype) @ (self.value - weight[self.rows])
        else:
            delta = self.delta_weight(weight)
            update = kind.call(layer, in_dtype(kind, inputs, delta.dtype), y, delta)
        result: Tensor = y + (update * strength).to(y.dtype)
        return result

    def place(self) -> None:
        """The rows' indices: no checkpoint holds them, and `.to_empty()` leaves no values in them."""
        self.rows = torch.tensor(self._spec.rows, device=self.value.device)
