"""LoHa: W' = W + s·(B₁·A₁)∘(B₂·A₂), of rank up to r² (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098, §2.2)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lorakit.layers import Kind, Mode, accumulation_dtype
from lorakit.variants.low_rank import Ranked, rank_caution
from lorakit.variants.updates import DenseUpdate


@final
@dataclass(frozen=True)
class LoHa(Ranked):
    """Hyper-parameters of LoHa.

    Args:
        rank: r of each of the two products; that of their Hadamard product goes up to r².
        alpha: the numerator of the scale alpha/r, above 0; None means `rank`, a scale of 1.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    no_product: ClassVar[str] = "multiplies two products entry by entry"
    file_names: ClassVar[Mapping[str, str]] = {
        "B1": "hada_w1_a",
        "A1": "hada_w1_b",
        "B2": "hada_w2_a",
        "A2": "hada_w2_b",
    }

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "HadamardUpdate":
        """The four factors for one weight."""
        return HadamardUpdate(weight, self, kind, mode)

    def peft_fields(self) -> dict[str, Any]:
        """R and alpha."""
        return {"peft_type": "LOHA", "r": self.rank, "alpha": self.rank if self.alpha is None else self.alpha}

    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """A rank above min(d, k) buys nothing."""
        return rank_caution(self.rank, kind, weight)

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LoHa | None":
        """A LoHaConfig."""
        return cls(config["r"], config["alpha"]) if config.get("peft_type") == "LOHA" else None


@final
class HadamardUpdate(DenseUpdate):
    """s·(B₁·A₁)∘(B₂·A₂) for one weight.

    Attributes:
        B1, B2: (d, r); (E, d, r) of a stack.
        A1, A2: (r, k), whatever axes the layer's weight has. A2 is zero at first, the others as `nn.Linear` begins.
    """

    def __init__(self, weight: Tensor, spec: LoHa, kind: Kind, mode: Mode) -> None:
        super().__init__()
        self.kind = kind
        self.mode = mode
        self.scale = spec.scale
        *stack, d, k = kind.matrix_shape(weight)
        dtype = accumulation_dtype(weight.dtype)
        for name in ("B1", "A1", "B2", "A2"):
            shape = (*stack, d, spec.rank) if name[0] == "B" else (*stack, spec.rank, k)
            factor = torch.zeros(shape, dtype=dtype, device=weight.device)
            if name != "A2":  # (B₂·A₂) = 0, so nothing changes
                bound = 1 / math.sqrt(shape[-1])
                nn.init.uniform_(factor, -bound, bound)
            self.register_parameter(name, nn.Parameter(factor))

    B1: nn.Parameter
    A1: nn.Parameter
    B2: nn.Parameter
    A2: nn.Parameter

    def matrix(self) -> Tensor:
        """ΔW, (d, k)."""
        return (self.B1 @ self.A1) * (self.B2 @ self.A2) * self.scale

    def extra_repr(self) -> str:
        """The rank, for `print(model)`."""
        return f"rank={self.A1.shape[-2]}, scale={self.scale:g}, mode={self.mode!r}"
