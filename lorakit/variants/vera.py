"""VeRA: W' = W + diag(b)·B·diag(d)·A; A and B are random and shared (Kopiczko et al. 2023, arXiv:2310.11454)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import Kind, Mode, accumulation_dtype
from lorakit.variants.checks import checked_integer, checked_number
from lorakit.variants.low_rank import checked_rank
from lorakit.variants.updates import FactoredUpdate
from lorakit.variants.variant import Variant

_MOST = 2**32
"""Numbers of a shared matrix; a damaged file may ask for any."""


@final
@dataclass(frozen=True)
class VeRA(Variant):
    """Hyper-parameters of VeRA.

    Args:
        rank: r, the number of rows of A and columns of B; large ones, such as 256, cost little.
        seed: what A and B are drawn from, as PEFT draws them; they are not saved.
        dropout: as for LoRA.
        d_initial: what the vector d begins as; b begins at zero.
        sizes: (d, k) of the shared matrices, from which each weight takes the first rows and columns; None means the
            largest of the weights that are adapted.

    Raises:
        LorakitError: a value is out of range or of the wrong type.
    """

    rank: int
    seed: int = 0
    dropout: float = 0.0
    d_initial: float = 0.1
    sizes: tuple[int, int] | None = None

    no_product: ClassVar[str] = "has matrices that no file holds; combine(model, ...) adds them, or"
    file_names: ClassVar[Mapping[str, str]] = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    shared_names: ClassVar[Sequence[str]] = ("base_model.vera_A", "base_model.vera_B")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank))
        object.__setattr__(self, "seed", checked_integer("seed", self.seed, at_least=0, at_most=2**63 - 1))
        object.__setattr__(self, "dropout", checked_number("dropout", self.dropout, at_least=0, below=1))
        object.__setattr__(self, "d_initial", checked_number("d_initial", self.d_initial))
        if self.sizes is not None:
            d, k = self.sizes
            sizes = (checked_integer("sizes", d, 1, 2**24), checked_integer("sizes", k, 1, 2**24))
            if self.rank * max(sizes) > _MOST:
                raise LorakitError(f"shared matrices of sizes={sizes} and rank {self.rank} are larger than any memory")
            object.__setattr__(self, "sizes", sizes)

    @property
    def shared_numbers(self) -> int:
        """Of the two matrices, which no file has to hold: one of a few bytes may ask for any."""
        return 0 if self.sizes is None else self.rank * sum(self.sizes)

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> "VeRA":
        """With `sizes`: the most rows and the most columns of all."""
        if self.sizes is not None:
            return self
        return replace(self, sizes=(max(shape[-2] for shape in shapes), max(shape[-1] for shape in shapes)))

    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> "SharedFactorsUpdate":
        """The two vectors for one weight."""
        return SharedFactorsUpdate(weight, self.fit([kind.matrix_shape(weight)]), kind, mode)

    def peft_fields(self) -> dict[str, Any]:
        """r, projection_prng_key, vera_dropout and d_initial; the shared matrices are drawn anew."""
        return {
            "peft_type": "VERA",
            "r": self.rank,
            "projection_prng_key": self.seed,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "save_projection": False,
        }

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "VeRA | None":
        """A VeraConfig; shared matrices in the file are checked to be those that its seed gives."""
        if config.get("peft_type") != "VERA":
            return None
        variant = cls(
            rank=config["r"],
            seed=config["projection_prng_key"],
            dropout=config.get("vera_dropout", 0.0),
            d_initial=config.get("d_initial", 0.1),
        )
        A, B = (tensors.get(name) for name in cls.shared_names)
        if A is None or B is None:
            return variant
        if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == variant.rank:
            raise LorakitError(
                f"vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} are no two matrices of rank {variant.rank}"
            )
        variant = replace(variant, sizes=(B.shape[0], A.shape[1]))
        for theirs, ours in zip((A, B), _shared(variant, torch.float32, torch.device("cpu")), strict=True):
            if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=1e-2, atol=1e-3):
                raise LorakitError("the shared matrices in the file are not those that projection_prng_key gives")
        return variant


@final
class SharedFactorsUpdate(FactoredUpdate):
    """diag(b)·B·diag(d)·A for one weight; A and B are corners of two matrices that all weights share.

    Attributes:
        d: (r,), trained; (E, r) of a stack.
        b: (d,), trained, zero at first; (E, d) of a stack.
        A, B: (r, k) and (d, r), buffers that no file holds: views of the shared matrices, on any device and in any
            dtype, so that they take memory once and not for every weight.
    """

    A: Tensor
    B: Tensor

    def __init__(self, weight: Tensor, spec: VeRA, kind: Kind, mode: Mode) -> None:
        super().__init__(kind, mode, 1.0, spec.dropout)
        self._spec = spec
        *stack, self._d, self._k = kind.matrix_shape(weight)
        most_d, most_k = cast(tuple[int, int], spec.sizes)
        if self._d > most_d or self._k > most_k:
            raise LorakitError(f"a weight of {self._d}×{self._k} has no room in shared matrices of sizes={spec.sizes}")
        self._a_shape, self._b_shape = kind.factor_shapes(weight, spec.rank)
        dtype = accumulation_dtype(weight.dtype)
        self.d = nn.Parameter(torch.full((*stack, spec.rank), float(spec.d_initial), dtype=dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros((*stack, self._d), dtype=dtype, device=weight.device))
        for name in "AB":
            self.register_buffer(name, None, persistent=False)
        self.place()

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(d)·A and diag(b)·B."""
        A, B = self.d.unsqueeze(-1) * self.A, self.b.unsqueeze(-1) * self.B
        return A.view(self._a_shape), B.view(self._b_shape)

    def place(self) -> None:
        """A and B: `.to()` copies each buffer alone, and the copies are given up for views of one matrix there."""
        A, B = _shared(self._spec, self.d.dtype, self.d.device)
        self.A, self.B = A[:, : self._k], B[: self._d]


_kept: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()


def _shared(spec: VeRA, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The shared A, (r, k), and B, (d, r): uniform in ±√(6/columns), drawn on the CPU as PEFT does."""
    assert spec.sizes is not None
    d, k = spec.sizes
    keys = [(spec.rank, spec.seed, d, k, dtype, device, name) for name in "AB"]
    found = [_kept.get(key) for key in keys]
    if found[0] is None or found[1] is None:
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        for i, shape in enumerate(((spec.rank, k), (d, spec.rank))):
            if device.type == "meta":
                found[i] = torch.empty(shape, dtype=dtype, device=device)
                continue
            bound = math.sqrt(6 / shape[1])
            found[i] = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device, dtype)
        for key, tensor in zip(keys, found, strict=True):
            assert tensor is not None
            _kept[key] = tensor
    A, B = found
    assert A is not None and B is not None
    return A, B
