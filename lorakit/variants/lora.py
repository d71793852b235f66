"""LoRA: W' = W + s·B·A with s = alpha/r (Hu et al. 2021, arXiv:2106.09685, §4.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Inputs, Kind, Mode, Parameter, Strength, Update
from lorakit.variants.low_rank import LowRank, low_rank_arguments
from lorakit.variants.starts import FROM_VALUES, start
from lorakit.variants.updates import FactoredUpdate, ScaledUpdate


@final
@dataclass(frozen=True)
class LoRA(LowRank):
    """Hyper-parameters of LoRA.

    Args:
        rank: r, the inner dimension of B·A; from 1 to 2²⁴.
        alpha: the numerator of the scale, above 0; None means `rank`, a scale of 1.
        dropout: probability in [0, 1) with which entries of the adapter's input are dropped in training. It acts
            on the input, so it needs an update beside the call.
        scaling: "standard" is alpha/r; "rslora" is alpha/√r, which keeps the update's size when the rank grows
            (Kalajdzievski 2023, arXiv:2312.03732).
        init: how A and B begin.
            - "kaiming": A is uniform in ±1/√k, as `nn.Linear` begins, B is zero. "gaussian": A is normal with standard
              deviation `std`. "orthogonal": A has orthonormal rows. Of an embedding A is zero and B begins so,
              "kaiming" being standard normal there.
            - "pissa": the largest singular directions of W (arXiv:2404.02948); "olora": W's QR decomposition
              (arXiv:2406.01775); "lora-ga": the first gradient's singular directions (arXiv:2407.05000), which needs
              `attach(..., data=, loss=)`. Their first product is subtracted, so attaching changes nothing and W stays;
              a file holds them as LoRA of twice the rank, exact on the original W.
            - "eva": A is the principal directions of the layer's inputs (arXiv:2410.07170), B is zero; it needs
              `attach(..., data=)`.
            - "loftq": B·A is the best approximation of what quantization took (arXiv:2310.08659), so that attaching
              brings the model nearer to the original; it needs `attach(..., original=model)`.
        std: for init="gaussian": the standard deviation; None means 1/rank.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    inits: ClassVar[Sequence[str]] = ("kaiming", "gaussian", "orthogonal", "eva", "loftq", *FROM_VALUES)

    @property
    def subtracts(self) -> bool:
        """Whether the first product is subtracted, since it is not zero."""
        return self.init in FROM_VALUES

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> Update:
        """A and B for one weight."""
        update = SubtractedUpdate if self.subtracts else LowRankParametrization
        return update(weight, self, kind, mode, evidence)

    def peft_fields(self) -> dict[str, Any]:
        """r, lora_alpha, lora_dropout and use_rslora, of the LoRA of twice the rank if that is what is saved."""
        fields = super().peft_fields()
        if self.subtracts:  # [B, −B₀]·[A; A₀], with the same scale
            growth = 2**0.5 if self.scaling == "rslora" else 2
            fields |= {"r": 2 * self.rank, "lora_alpha": fields["lora_alpha"] * growth}
        return fields

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LoRA | None":
        """Plain LoRA."""
        plain = config.get("peft_type") == "LORA" and not config.get("use_dora")
        return cls(**low_rank_arguments(config)) if plain else None


@final
class LowRankParametrization(FactoredUpdate):
    """The two factors of one weight: `layer.weight` reads as W + s·B·A when enabled, and as W when not.

    `attach` builds these; one can also be used alone, with nothing but torch:

        register_parametrization(layer, "weight", LowRankParametrization(layer.weight, LoRA(rank=1)))

    Args:
        weight: the weight W to adapt, two or more axes; it gives shape, dtype and device, and is not kept.
        spec: rank, scale and initialisation.
        kind: how W is seen as a d×k matrix; by default its first axis is d.
        mode: where the update acts when it is attached to a layer.
        evidence: what the initialisation is computed from, beside W.

    Attributes:
        A: (r, k) for a 2-D weight, for others as the kind stores it; in float32 if W is of 16 bits or less, else in
            W's dtype.
        B: (d, r), zero at first: B·A = 0, nothing changes until it is trained.
        enabled: set it to False to read W itself.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        spec: LoRA,
        kind: Kind | None = None,
        mode: Mode = "weight",
        evidence: Tensor | None = None,
    ) -> None:
        if weight.dim() < 2 and kind is None:
            raise LorakitError(f"a weight of shape {tuple(weight.shape)} is no matrix; LoRA needs two axes or more")
        if spec.subtracts:
            raise LorakitError(f"init={spec.init!r} subtracts its first product: use attach, which builds that")
        super().__init__(kind or Parameter("weight", flat=True), mode, spec.scale, spec.dropout)
        A, B = start(spec, self.kind, weight, evidence)
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        own = self._parameters  # this runs at every call, and an attribute of a module is found ten times slower
        return cast(Tensor, own["A"]), cast(Tensor, own["B"])


@final
class SubtractedUpdate(ScaledUpdate):
    """s·(B·A − B₀·A₀), where A₀ and B₀ are how A and B began: zero at the start, though neither factor is.

    The two products are formed alike and then subtracted, so that at the start they cancel to the bit. A file holds
    the one LoRA of twice the rank that this is: [A; A₀] and [B, −B₀].
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, weight: Tensor, spec: LoRA, kind: Kind, mode: Mode, evidence: Tensor | None) -> None:
        super().__init__(kind, mode, spec.scale, spec.dropout)
        A, B = start(spec, self.kind, weight, evidence)
        self._axis = len(self.kind.matrix_shape(weight)) - 2  # of A's ranks; of B's it is the next
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    A0: Tensor
    B0: Tensor

    def product(self, weight: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Strength·s·[B, −B₀] and [A; A₀] as matrices, (d, 2r) and (2r, k), after the stack's axis if there is one."""
        saved, inner = self.saved(), self._axis + 1
        return (saved["B"] * (self.scale * strength)).flatten(inner), saved["A"].flatten(inner)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """s·(B·A − B₀·A₀)."""
        now = self.kind.delta_weight(weight, self.A, self.B * self.scale)
        return now - self.kind.delta_weight(weight, self.A0, self.B0 * self.scale)

    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """Y + strength·s·(B(A(x)) − B₀(A₀(x)))."""
        zero, scale = torch.zeros_like(base, dtype=self.A.dtype), self.scaled(strength)
        inputs = self.dropped(inputs, self.A.dtype)  # the same entries for both
        now = cast(CalledKind, self.kind).beside(layer, inputs, zero, self.A, self.B, scale)
        then = cast(CalledKind, self.kind).beside(layer, inputs, zero, self.A0, self.B0, scale)
        return y + (now - then).to(y.dtype)

    def saved(self) -> dict[str, Tensor]:
        """[A; A₀] and [B, −B₀]."""
        return {
            "A": torch.cat([self.A.detach(), self.A0], self._axis),
            "B": torch.cat([self.B.detach(), -self.B0], self._axis + 1),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `saved`."""
        A, A0 = (part.contiguous() for part in tensors["A"].chunk(2, self._axis))
        B, minus_B0 = (part.contiguous() for part in tensors["B"].chunk(2, self._axis + 1))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.A0, self.B0 = A0, -minus_B0
