"""What the variants with two trained factors share: rank, scale, dropout, and how the factors begin."""

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.layers import Kind
from lorakit.variants.checks import check_one_of, checked_integer, checked_number
from lorakit.variants.variant import Evidence, Variant

# No weight has more rows or columns. A larger rank, from a damaged file say, would overflow the size of a tensor.
_MOST = 2**24

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga", "loftq"]


def checked_rank(rank: object) -> int:
    """A rank from 1 to 2²⁴."""
    return checked_integer("rank", rank, at_least=1, at_most=_MOST)


def rank_caution(rank: int, kind: Kind, weight: Tensor) -> str | None:
    """A rank above min(d, k) buys nothing."""
    d, k = kind.matrix_shape(weight)[-2:]
    if rank <= min(d, k):
        return None
    return (
        f"rank {rank} is above min(d, k) = {min(d, k)} of its {d}×{k} weight: B·A cannot have a rank above "
        f"{min(d, k)}, the rest is parameters without effect"
    )


@dataclass(frozen=True)
class Ranked(Variant, ABC):
    """A variant with a rank and a scale alpha/r; without an alpha the scale is 1."""

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", checked_number("alpha", self.alpha, above=0))

    @property
    def scale(self) -> float:
        """Alpha over rank."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class LowRank(Variant, ABC):
    """The hyper-parameters of a variant with two factors A and B; `LoRA` says what each means.

    Not every init has a meaning for every variant (`inits`). Whichever it is, attaching changes no output, but for
    "loftq", which is there to.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: Init = "kaiming"
    std: float | None = None

    file_names: ClassVar[Mapping[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    inits: ClassVar[Sequence[str]] = ("kaiming", "gaussian", "orthogonal", "eva")
    """The starts that have a meaning for this variant."""

    def __post_init__(self) -> None:
        rank = checked_rank(self.rank)
        alpha = None if self.alpha is None else checked_number("alpha", self.alpha, above=0)
        dropout = checked_number("dropout", self.dropout, at_least=0, below=1)
        std = None if self.std is None else checked_number("std", self.std, above=0)
        for name, value in (("rank", rank), ("alpha", alpha), ("dropout", dropout), ("std", std)):
            object.__setattr__(self, name, value)
        check_one_of("scaling", self.scaling, ("standard", "rslora"))
        check_one_of("init", self.init, self.inits)
        if std is not None and self.init != "gaussian":
            raise LorakitError(f"std={std} has no meaning with init={self.init!r}; use init='gaussian'")

    @property
    def scale(self) -> float:
        """s, the factor before B·A: alpha/r, or alpha/√r for rsLoRA."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def needs(self) -> Evidence | None:
        """The inputs for "eva", gradients for "lora-ga", the weights before quantization for "loftq"."""
        wanted: dict[str, Evidence] = {"eva": "inputs", "lora-ga": "gradients", "loftq": "original"}
        return wanted.get(self.init)

    @property
    def reads_weight(self) -> bool:
        """Whether the factors begin as something computed from the weight."""
        return self.init in ("pissa", "olora", "lora-ga", "loftq")

    def peft_fields(self) -> dict[str, Any]:
        """The fields of PEFT's LoraConfig."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "rslora",
        }

    def product(self, saved: Mapping[str, Tensor], inner: int) -> tuple[Tensor, Tensor] | None:
        """s·B and A."""
        B, A = saved["B"], saved["A"]
        return (B if self.scale == 1 else B * self.scale).flatten(inner), A.flatten(inner)

    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """A rank above min(d, k) buys nothing."""
        return rank_caution(self.rank, kind, weight)


def low_rank_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a LoraConfig of PEFT gives."""
    for field in ("r", "lora_alpha"):
        if config[field] is None:
            raise KeyError(field)  # it is there, and says nothing
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "scaling": "rslora" if config.get("use_rslora") else "standard",
    }
