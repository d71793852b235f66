"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, arXiv:2308.03303): only B is trained, and no input need be kept."""

from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from lorakit.layers import Kind, Mode
from lorakit.variants.low_rank import LowRank
from lorakit.variants.starts import start
from lorakit.variants.updates import FactoredUpdate


@final
@dataclass(frozen=True)
class LoRAFA(LowRank):
    """Hyper-parameters of LoRA-FA: those of `LoRA`, with a random start or "eva", which suits a frozen A."""

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "FrozenAUpdate":
        """A, drawn once, and B for one weight."""
        return FrozenAUpdate(weight, self, kind, mode, evidence)


@final
class FrozenAUpdate(FactoredUpdate):
    """s·B·A, of which only B is trained. For its gradient autograd keeps A·x, of r numbers, and not x.

    Attributes:
        A: a buffer, as for LoRA; saved, since the update is nothing without it.
        B: as for LoRA. Of a look-up too it is B that begins at zero, since A would stay there.
    """

    def __init__(self, weight: Tensor, spec: LoRAFA, kind: Kind, mode: Mode, evidence: Tensor | None) -> None:
        super().__init__(kind, mode, spec.scale, spec.dropout)
        A, B = start(spec, kind, weight, evidence, frozen_A=True)
        self.register_buffer("A", A)
        self.B = nn.Parameter(B)

    A: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.A, self.B
