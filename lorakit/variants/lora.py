"""LoRA: W' = W + s·B·A with s = alpha/r (Hu et al. 2021, arXiv:2106.09685, §4.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Inputs, Kind, Mode, Parameter, Update, accumulation_dtype
from lorakit.variants.checks import check_one_of, checked_integer, checked_number
from lorakit.variants.variant import Variant

# No weight has more rows or columns. A larger rank, from a damaged file say, would overflow the size of a tensor.
_MOST = 2**24


@final
@dataclass(frozen=True)
class LoRA(Variant):
    """Hyper-parameters of LoRA.

    Args:
        rank: r, the inner dimension of B·A; from 1 to 2²⁴.
        alpha: the numerator of the scale, above 0; None means `rank`, a scale of 1.
        dropout: probability in [0, 1) with which entries of the adapter's input are dropped in training. It acts
            on the input, so it needs an update beside the call.
        scaling: "standard" is alpha/r; "rslora" is alpha/√r, which keeps the update's size when the rank grows
            (Kalajdzievski 2023, arXiv:2312.03732).
        init: how A begins; B is zero. "kaiming" is uniform in ±1/√k, as `nn.Linear` begins; "gaussian" is normal with
            standard deviation `std`. Of an embedding A is zero and B begins so, "kaiming" being standard normal there.
        std: for init="gaussian": the standard deviation; None means 1/rank.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    std: float | None = None

    file_names: ClassVar[Mapping[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}

    def __post_init__(self) -> None:
        rank = checked_integer("rank", self.rank, at_least=1, at_most=_MOST)
        alpha = rank if self.alpha is None else checked_number("alpha", self.alpha, above=0)
        dropout = checked_number("dropout", self.dropout, at_least=0, below=1)
        std = None if self.std is None else checked_number("std", self.std, above=0)
        for name, value in (("rank", rank), ("alpha", alpha), ("dropout", dropout), ("std", std)):
            object.__setattr__(self, name, value)
        check_one_of("scaling", self.scaling, ("standard", "rslora"))
        check_one_of("init", self.init, ("kaiming", "gaussian"))
        if std is not None and self.init != "gaussian":
            raise LorakitError(f"std={std} has no meaning with init={self.init!r}; use init='gaussian'")

    @property
    def scale(self) -> float:
        """s, the factor before B·A: alpha/r, or alpha/√r for rsLoRA."""
        alpha = cast(float, self.alpha)
        return alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def peft_fields(self) -> dict[str, Any]:
        """r, lora_alpha, lora_dropout and use_rslora."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "rslora",
        }

    def build(self, kind: Kind, weight: Tensor, mode: Mode) -> "LowRankParametrization":
        """A and B for one weight."""
        if mode == "weight" and self.dropout > 0:
            raise LorakitError(
                f"dropout={self.dropout} acts on the input of a call and cannot be expressed in the weight; "
                "use dropout=0, or adapt the layer itself, beside its call (mode='beside')"
            )
        if kind.lookup and self.dropout > 0:
            raise LorakitError(
                f"dropout={self.dropout} acts on numbers, and the input of an {kind.name} is indices; use dropout=0 "
                "there, as an adapter of its own"
            )
        return LowRankParametrization(weight, self, kind=kind, mode=mode)

    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """A rank above min(d, k) buys nothing."""
        d, k = kind.matrix_shape(weight)
        if self.rank <= min(d, k):
            return None
        return (
            f"rank {self.rank} is above min(d, k) = {min(d, k)} of its {d}×{k} weight: B·A cannot have a rank above "
            f"{min(d, k)}, the rest is parameters without effect"
        )


@final
class LowRankParametrization(Update):
    """The two factors of one weight: `layer.weight` reads as W + s·B·A when enabled, and as W when not.

    `attach` builds these; one can also be used alone, with nothing but torch:

        register_parametrization(layer, "weight", LowRankParametrization(layer.weight, LoRA(rank=1)))

    Args:
        weight: the weight W to adapt, two or more axes; it gives shape, dtype and device, and is not kept.
        spec: rank, scale and initialisation.
        kind: how W is seen as a d×k matrix; by default its first axis is d.
        mode: where the update acts when it is attached to a layer.

    Attributes:
        A: (r, k) for a 2-D weight, for others as the kind stores it; in float32 if W is of 16 bits or less, else in
            W's dtype.
        B: (d, r), zero at first: B·A = 0, nothing changes until it is trained.
        enabled: set it to False to read W itself.
    """

    def __init__(self, weight: Tensor, spec: LoRA, kind: Kind | None = None, mode: Mode = "weight") -> None:
        super().__init__()
        if weight.dim() < 2 and kind is None:
            raise LorakitError(f"a weight of shape {tuple(weight.shape)} is no matrix; LoRA needs two axes or more")
        self.kind = kind or Parameter("weight", flat=True)
        self.mode = mode
        self.scale = spec.scale
        self.dropout = spec.dropout
        self.enabled = True
        a_shape, b_shape = self.kind.factor_shapes(weight, spec.rank)
        dtype = accumulation_dtype(weight.dtype)
        self.A = nn.Parameter(torch.empty(a_shape, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.empty(b_shape, dtype=dtype, device=weight.device))
        # B·A = 0, so nothing changes. Of a look-up it is A that begins at zero, one column for each index: what is
        # never looked up in training then stays as it was.
        random, zero = (self.B, self.A) if self.kind.lookup else (self.A, self.B)
        nn.init.zeros_(zero)
        if spec.init == "gaussian":
            nn.init.normal_(random, std=1 / spec.rank if spec.std is None else spec.std)
        elif self.kind.lookup:
            nn.init.normal_(random)
        else:
            bound = 1 / math.sqrt(self.kind.matrix_shape(weight)[1])
            nn.init.uniform_(random, -bound, bound)

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength·s·B·A, or W itself when not enabled."""
        if not self.enabled:
            return weight
        delta = self.kind.delta_weight(weight, self.A, self.B)
        wide = torch.promote_types(weight.dtype, delta.dtype)
        return torch.add(weight.to(wide), delta.to(wide), alpha=self.scale * strength).to(weight.dtype)

    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, strength: float) -> Tensor:
        """The output y plus strength·s·B(A(x)); y itself when not enabled."""
        if not self.enabled:
            return y
        kind = cast(CalledKind, self.kind)
        if not kind.lookup:
            x, *rest = inputs
            x = x.to(self.A.dtype)
            if self.dropout > 0 and self.training:
                x = F.dropout(x, self.dropout)
            inputs = (x, *rest)
        return kind.beside(layer, inputs, y, self.A, self.B, self.scale * strength)

    def extra_repr(self) -> str:
        """Shapes and scale, for `print(model)`."""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, scale={self.scale:g}, mode={self.mode!r}"
