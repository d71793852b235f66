"""AdaLoRA: W' = W + s·P·diag(λ)·Q, whose ranks a budget prunes in training (Zhang et al. 2023, arXiv:2303.10512).

The budget itself is `lorakit.RankBudget`; without one, this is LoRA in the form of an SVD.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import Kind, Mode, accumulation_dtype
from lorakit.variants.checks import checked_number
from lorakit.variants.low_rank import Ranked, rank_caution
from lorakit.variants.updates import FactoredUpdate


@final
@dataclass(frozen=True)
class AdaLoRA(Ranked):
    """Hyper-parameters of AdaLoRA.

    Args:
        rank: r that each weight begins with; about 1.5 times what it should have in the mean at the end.
        alpha: the numerator of the scale alpha/r, above 0; None means `rank`, a scale of 1.
        dropout: as for LoRA.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    dropout: float = 0.0

    file_names: ClassVar[Mapping[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dropout", checked_number("dropout", self.dropout, at_least=0, below=1))

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "TripletUpdate":
        """P, λ and Q for one weight."""
        return TripletUpdate(weight, self, kind, mode)

    def peft_fields(self) -> dict[str, Any]:
        """init_r, target_r, lora_alpha and lora_dropout; and total_step, which PEFT insists on, though it is past."""
        return {
            "peft_type": "ADALORA",
            "init_r": self.rank,
            "target_r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "total_step": 1,
        }

    def product(self, saved: Mapping[str, Tensor], inner: int) -> tuple[Tensor, Tensor] | None:
        """s·P and diag(λ)·Q."""
        B, A = saved["B"].flatten(inner), saved["A"].flatten(inner)
        return B * self.scale, saved["E"] * A

    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """A rank above min(d, k) buys nothing."""
        return rank_caution(self.rank, kind, weight)

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "AdaLoRA | None":
        """An AdaLoraConfig, unless ranks were taken out of the file."""
        if config.get("peft_type") != "ADALORA":
            return None
        if config.get("rank_pattern"):
            raise LorakitError("rank_pattern: the ranks that were pruned are not in the file; save it unpruned")
        return cls(config["init_r"], config["lora_alpha"], config.get("lora_dropout", 0.0))


@final
class TripletUpdate(FactoredUpdate):
    """s·P·diag(λ)·Q for one weight, under PEFT's names.

    Attributes:
        A: Q, (r, k), as the kind stores it; normal with standard deviation 0.02.
        B: P, (d, r), the same.
        E: λ, (r, 1), zero at first; (E, r, 1) of a stack. A rank whose λ is zero is pruned.
    """

    def __init__(self, weight: Tensor, spec: AdaLoRA, kind: Kind, mode: Mode) -> None:
        super().__init__(kind, mode, spec.scale, spec.dropout)
        a_shape, b_shape = kind.factor_shapes(weight, spec.rank)
        *stack, _, _ = kind.matrix_shape(weight)
        like = torch.empty(0, dtype=accumulation_dtype(weight.dtype), device=weight.device)
        self.A = nn.Parameter(like.new_empty(a_shape).normal_(std=0.02))
        self.B = nn.Parameter(like.new_empty(b_shape).normal_(std=0.02))
        self.E = nn.Parameter(like.new_zeros((*stack, spec.rank, 1)))
        self._inner = len(stack) + 1

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(λ)·Q and P."""
        return self.E.view(*self.E.shape[:-1], *(1 for _ in self.A.shape[self._inner :])) * self.A, self.B

    def penalty(self) -> Tensor:
        """How far P's columns and Q's rows are from orthonormal: ‖PᵀP − I‖_F + ‖QQᵀ − I‖_F (equation 4)."""
        P, Q = self.B.flatten(self._inner), self.A.flatten(self._inner)
        eye = torch.eye(self.E.shape[-2], dtype=Q.dtype, device=Q.device)
        norms: Tensor = (P.mT @ P - eye).norm(dim=(-2, -1)) + (Q @ Q.mT - eye).norm(dim=(-2, -1))
        return norms.sum()

    def triplet_scores(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The importance of each rank, (r, 1): its λ's and the means of its row's and its column's (equation 8)."""
        rows = scores["A"].flatten(self._inner).mean(-1, keepdim=True)
        columns = scores["B"].flatten(self._inner).mean(-2).unsqueeze(-1)
        return scores["E"] + rows + columns
