"""LoKr: W' = W + s·(W₁ ⊗ W₂), a Kronecker product whose factors may be low-rank (LyCORIS, arXiv:2309.14859, §3.3)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import Kind, Mode, accumulation_dtype
from lorakit.variants.checks import checked_integer
from lorakit.variants.low_rank import Ranked
from lorakit.variants.updates import DenseUpdate


@final
@dataclass(frozen=True)
class LoKr(Ranked):
    """Hyper-parameters of LoKr.

    Args:
        rank: r of the factors that are decomposed; a factor no larger than that is kept whole.
        alpha: the numerator of the scale alpha/r, above 0; None means `rank`, a scale of 1.
        factor: how each side is split, n = factor·(n/factor) if that is whole; −1 means as near to √n as can be; or
            W₁'s own shape (d₁, k₁), which must divide that of the weight.
        decompose_both: whether the small factor W₁ is decomposed too.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    factor: int | tuple[int, int] = -1
    decompose_both: bool = False

    no_product: ClassVar[str] = "is a Kronecker product"
    file_names: ClassVar[Mapping[str, str]] = {
        name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, list | tuple):
            sides = tuple(checked_integer("factor", side, at_least=1, at_most=2**24) for side in self.factor)
            if len(sides) != 2:
                raise LorakitError(f"factor={self.factor!r} must be one integer, or the two of W₁'s shape")
            object.__setattr__(self, "factor", sides)
        elif self.factor != -1:
            object.__setattr__(self, "factor", checked_integer("factor", self.factor, at_least=1, at_most=2**24))
        if not isinstance(self.decompose_both, bool):
            raise LorakitError(f"decompose_both={self.decompose_both!r} must be True or False")

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "KroneckerUpdate":
        """The factors for one weight."""
        return KroneckerUpdate(weight, self, kind, mode)

    def incomplete(self, names: Collection[str]) -> str | None:
        """Each of W₁ and W₂ is there as a whole or as two factors."""
        missing = [w for w in ("w1", "w2") if w not in names and not {f"{w}_a", f"{w}_b"} <= set(names)]
        return ", ".join(f"lokr_{w}" for w in missing) or None

    def peft_fields(self) -> dict[str, Any]:
        """R, alpha, decompose_factor and decompose_both."""
        return {
            "peft_type": "LOKR",
            "r": self.rank,
            "alpha": self.rank if self.alpha is None else self.alpha,
            "decompose_factor": self.factor,
            "decompose_both": self.decompose_both,
        }

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LoKr | None":
        """A LoKrConfig."""
        if config.get("peft_type") != "LOKR":
            return None
        factor, both = config.get("decompose_factor", -1), config.get("decompose_both", False)
        return cls(config["r"], config["alpha"], factor, both)


def split(n: int, factor: int) -> tuple[int, int]:
    """N as a product of two: factor·(n/factor) if that is whole.

    Else the two nearest to √n, the smaller first, and that no larger than `factor`.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor < 0 else min(math.isqrt(n), factor)
    first = next(i for i in range(most, 0, -1) if n % i == 0)
    return first, n // first


@final
class KroneckerUpdate(DenseUpdate):
    """s·(W₁ ⊗ W₂) for one weight: d = d₁·d₂ and the inputs k₁·k₂; the kernel's axes belong to W₂.

    Attributes:
        w1: (d₁, k₁), zero at first; or w1_a (d₁, r), zero at first, and w1_b (r, k₁).
        w2: (d₂, k₂, *kernel); or w2_a (d₂, r) and w2_b (r, k₂·kernel). Of a stack, each after the stack's axis.
    """

    def __init__(self, weight: Tensor, spec: LoKr, kind: Kind, mode: Mode) -> None:
        super().__init__()
        self.kind = kind
        self.mode = mode
        self.scale = spec.scale
        rank, dtype = spec.rank, accumulation_dtype(weight.dtype)
        *stack, d, k = kind.matrix_shape(weight)
        kernel = tuple(kind.factor_shapes(weight, 1)[0][2:]) if not stack else ()
        k //= math.prod(kernel)
        of_d, of_k = spec.factor if isinstance(spec.factor, tuple) else (spec.factor, spec.factor)
        if isinstance(spec.factor, tuple) and (d % of_d or k % of_k):
            raise LorakitError(f"W₁ of shape {spec.factor} does not divide a weight of {d}×{k}; use another factor")
        (d1, d2), (k1, k2) = split(d, of_d), split(k, of_k)
        shapes: dict[str, tuple[int, ...]] = {"w1": (d1, k1)}
        if spec.decompose_both and rank < max(d1, k1) / 2:
            shapes = {"w1_a": (d1, rank), "w1_b": (rank, k1)}
        if rank < max(d2, k2) / 2:
            shapes |= {"w2_a": (d2, rank), "w2_b": (rank, k2 * math.prod(kernel))}
        else:
            shapes["w2"] = (d2, k2, *kernel)
        for name, shape in shapes.items():
            factor = torch.zeros((*stack, *shape), dtype=dtype, device=weight.device)
            if name not in ("w1", "w1_a"):  # W₁ = 0, so nothing changes
                bound = 1 / math.sqrt(math.prod(shape[1:]))
                nn.init.uniform_(factor, -bound, bound)
            self.register_parameter(name, nn.Parameter(factor))
        self._inner = len(stack) + 1

    def matrix(self) -> Tensor:
        """ΔW, (d, k)."""
        w1, w2 = self._factor("w1"), self._factor("w2") * self.scale
        # (…, d₁, 1, k₁, 1)·(…, 1, d₂, 1, k₂), laid out as (…, d₁·d₂, k₁·k₂)
        product = w1[..., :, None, :, None] * w2[..., None, :, None, :]
        return product.flatten(-2).flatten(-3, -2)

    def _factor(self, name: str) -> Tensor:
        whole = self._parameters.get(name)
        if whole is not None:
            return whole.flatten(self._inner)
        a, b = self._parameters[f"{name}_a"], self._parameters[f"{name}_b"]
        assert a is not None and b is not None
        return a @ b

    def extra_repr(self) -> str:
        """The shapes, for `print(model)`."""
        shapes = (f"{name}={tuple(tensor.shape)}" for name, tensor in self.named_parameters())
        return f"{', '.join(shapes)}, scale={self.scale:g}, mode={self.mode!r}"
