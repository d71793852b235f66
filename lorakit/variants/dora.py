"""DoRA: direction and magnitude apart, W' = m·(W + s·B·A)/‖W + s·B·A‖ (Liu et al. 2024, arXiv:2402.09353, §4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Inputs, Kind, Mode, Strength, accumulation_dtype, dense_weight
from lorakit.variants.low_rank import LowRank, low_rank_arguments
from lorakit.variants.starts import start
from lorakit.variants.updates import ScaledUpdate

_BLOCK = 2**22
"""Numbers of a 16-bit weight that are widened at a time."""


@final
@dataclass(frozen=True)
class DoRA(LowRank):
    """Hyper-parameters of DoRA: those of `LoRA`, with one of its random starts or "eva"."""

    file_names: ClassVar[Mapping[str, str]] = {**LowRank.file_names, "magnitude": "lora_magnitude_vector"}
    no_product: ClassVar[str] = "rescales the whole weight"
    exclusive: ClassVar[bool] = True

    @property
    def reads_weight(self) -> bool:
        """The magnitudes begin as the weight's norms."""
        return True

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "MagnitudeUpdate":
        """A, B and the magnitudes for one weight."""
        return MagnitudeUpdate(weight, self, kind, mode, evidence)

    def product(self, saved: Mapping[str, Tensor], inner: int) -> tuple[Tensor, Tensor] | None:
        """None: ΔW depends on W."""
        return None

    def peft_fields(self) -> dict[str, Any]:
        """LoRA's fields, and use_dora."""
        return {**super().peft_fields(), "use_dora": True}

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "DoRA | None":
        """LoRA with use_dora."""
        dora = config.get("peft_type") == "LORA" and config.get("use_dora")
        return cls(**low_rank_arguments(config)) if dora else None


@final
class MagnitudeUpdate(ScaledUpdate):
    """ΔW = g·(W + s·B·A) − W with one g = m/‖W + s·B·A‖ for each row of the matrix (each output).

    The norms are taken as constants by autograd (§4.3), and computed from the factors: ‖W + sBA‖² = ‖W‖² + 2s·B·(A·Wᵀ)
    + s²·B·(A·Aᵀ)·Bᵀ row by row, without a d×k temporary. Dropout acts on the low-rank part alone.

    Attributes:
        A, B: as for LoRA.
        magnitude: m, (d,), as PEFT stores it: (1, d, 1, ...) for a convolution, (E, d) of a stack. It begins as W's
            own norms, by the same computation, so that g is 1 to the bit.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, weight: Tensor, spec: DoRA, kind: Kind, mode: Mode, evidence: Tensor | None) -> None:
        super().__init__(kind, mode, spec.scale, spec.dropout)
        A, B = start(spec, kind, weight, evidence)
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))
        rest = B.shape[2:] if len(kind.matrix_shape(weight)) == 2 else ()
        norms = self._norms(weight)
        if not norms.is_meta and not norms.isfinite().all():
            raise LorakitError("the square of a row's norm is too large for its dtype; use another variant")
        self.magnitude = nn.Parameter(norms.view(*((1, -1, *rest) if rest else B.shape[:-1])))

    def delta_weight(self, weight: Tensor) -> Tensor:
        """g·(W + s·B·A) − W."""
        W = weight.to(self.A.dtype)
        matrix = self.kind.matrix_of(W + self.kind.delta_weight(weight, self.A, self.B * self.scale))
        change = self._factor(weight).unsqueeze(-1) * matrix - self.kind.matrix_of(W)
        return self.kind.weight_of(change, weight)

    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·(g·(W·x + s·B·A·x) − W·x): the base's output rescaled, and LoRA's product with g·B."""
        kind = cast(CalledKind, self.kind)
        g = self._factor(dense_weight(layer, kind))
        part = g if isinstance(strength, float) and strength == 1 else 1 + strength * (g - 1)
        scaled = kind.scale_rows(layer, inputs, base, part)
        total = scaled if y is base else scaled + (y - base)
        B = self.B * g.to(self.B.dtype).view(-1, *(1 for _ in self.B.shape[1:]))
        return self.add_product(layer, inputs, total, self.A, B, self.scaled(strength)).to(y.dtype)

    def _factor(self, weight: Tensor) -> Tensor:
        """g, (d,) or (E, d); 1 for a row that is zero, which has no direction to rescale."""
        norms = self._norms(weight)
        magnitude = self.magnitude.view(norms.shape)
        return torch.where(norms > 0, magnitude / norms.where(norms > 0, 1), 1)

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each row, (d,) or (E, d)."""
        inner = len(self.kind.matrix_shape(weight)) - 1
        dtype = accumulation_dtype(self.A.dtype)  # a model cast to 16 bits has its factors so: their squares overflow
        A, B = (factor.detach().to(dtype).flatten(inner) for factor in (self.A, self.B))
        B = B * self.scale
        if weight.is_meta:  # a sketch, and autocast knows no such device
            return B.new_empty(B.shape[:-1])
        if self.kind.padding_idx is not None:
            A = A.index_fill(-1, torch.tensor(self.kind.padding_idx, device=A.device), 0)
        W = self.kind.matrix_of(weight.detach())
        rows = W.shape[-2] if W.dtype == A.dtype else max(1, _BLOCK // (W.numel() // W.shape[-2]))
        with torch.autocast(weight.device.type, enabled=False):
            squares, products = [], []
            for block in W.split(rows, dim=-2):
                block = block.to(A.dtype)
                squares.append(torch.linalg.vector_norm(block, dim=-1).square())
                products.append((A @ block.mT).mT)  # (…, rows, r); the thin side first, as in `thin.py`
            own = (B @ (A @ A.mT) * B).sum(-1)
            cross = (torch.cat(products, -2) * B).sum(-1)
            return (torch.cat(squares, -1) + 2 * cross + own).clamp_min(0).sqrt()
