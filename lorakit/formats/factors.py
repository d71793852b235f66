"""What the readers and writers of two plain factors have in common: collecting them, and giving them one scale."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.header import Header, WeightEntry, file_key
from lorakit.storage import all_finite, name_of
from lorakit.values.adapter import Adapter, check
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, Full, LoRA, Variant


class Part(NamedTuple):
    """What a reader found of one weight."""

    path: str
    variant: Variant
    tensors: Mapping[str, Tensor]
    """By the names of `variant.file_names`."""
    parameter: str = "weight"
    kind: str | None = None


Groups = dict[str, dict[str, Tensor]]
"""Layer → what it has, by name."""


def grouped(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> tuple[Groups, dict[str, Tensor]]:
    """Tensors by layer, each under the name that its ending has here, and those that end in none of them."""
    found: Groups = {}
    others = {}
    for key, tensor in tensors.items():
        name = next((name for ending, name in endings.items() if key == ending[1:] or key.endswith(ending)), None)
        if name is None:
            others[key] = tensor
        else:
            ending = next(ending for ending, each in endings.items() if each == name)
            found.setdefault(key[: -len(ending)], {})[name] = tensor
    return found, others


def factor_problem(path: str, found: Mapping[str, Tensor], axes: int = 2) -> str | None:
    """What is wrong with the two factors of a layer, A (r, k) and B (d, r), before anything is made of them."""
    missing = [name for name in ("A", "B") if name not in found]
    if missing:
        return f"{path!r} lacks its factor {' and '.join(missing)}"
    A, B = found["A"], found["B"]
    for name, tensor in found.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            return f"{path!r}: {name} is of dtype {tensor.dtype}; floats of 16 bits or more are needed"
        if not tensor.numel():
            return f"{path!r}: {name} of shape {tuple(tensor.shape)} is empty"
    if A.dim() != axes or B.dim() != axes:
        return f"{path!r}: A {tuple(A.shape)}, B {tuple(B.shape)}: a factor is no matrix"
    return None


def adapter_of(content: Content, format: str, parts: Iterable[Part], problems: list[str], **more: Any) -> Adapter:
    """The adapter that these parts make up.

    Raises:
        LorakitError: there are problems, all of which it lists, or the tensors do not fit together.
    """
    where, parts = str(content.path), list(parts)
    check(where, problems)
    if not parts:
        raise LorakitError(f"{where} is no adapter that can be used: it adapts no weight")
    common = Counter(part.variant for part in parts).most_common(1)[0][0]
    entries, tensors = [], {}
    for part in parts:
        own = None if part.variant == common else part.variant
        entry = WeightEntry(part.path, part.parameter, None, None, None, None, own, kind=part.kind)
        entries.append(entry)
        for name, tensor in part.tensors.items():
            key = file_key(entry.path, entry.parameter, part.variant.file_names[name], False)
            if key in tensors:
                problems.append(f"it holds {entry.name!r} twice")
            tensors[key] = tensor
    check(where, problems)
    header = Header(name_of(content.path), common, tuple(entries), False, more.pop("facts", {}))
    return Adapter.of(header, tensors, where, format=format, **more)


def fact_of(adapter: Adapter, format: str) -> dict[str, Any]:
    """What a reader of this format noted. It may have been in a file since, and be anything."""
    found = adapter.facts.get(format)
    return dict(found) if isinstance(found, Mapping) else {}


def whole_parts(tensors: Mapping[str, Tensor]) -> list[Part]:
    """What is no factor, as parameters that were trained as a whole."""
    return [
        Part(key.rpartition(".")[0], Full(), {"value": tensor}, key.rpartition(".")[2])
        for key, tensor in tensors.items()
    ]


def variant_of(
    path: str, problems: list[str], rank: int, alpha: Any, dropout: Any = 0.0, dora: bool = False
) -> LoRA | DoRA:
    """LoRA or DoRA with these; what is no rank, alpha or dropout is a problem."""
    try:
        return (DoRA if dora else LoRA)(rank, alpha, 0.0 if dropout is None else dropout)
    except LorakitError as error:
        problems.append(f"{path!r}: {error}")
        return LoRA(1)


class Factors(NamedTuple):
    """Two factors of a weight that is to be written, and their scale."""

    weight: AdapterWeight
    A: Tensor
    B: Tensor
    """In the shapes in which a layer stores them."""
    alpha: float
    """Scale · rank."""
    rank: int

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank

    @property
    def path(self) -> str:
        """The layer."""
        return self.weight.entry.path


def factors_of(adapter: Adapter, problems: list[str], lost: list[str], *, dora: bool = False) -> list[Factors]:
    """The factors of all low-rank weights; what has none, but for whole parameters, is a problem.

    Args:
        adapter: what is to be written.
        problems: everything that the format has no place for.
        lost: what it has no place for and no output depends on.
        dora: whether the format has a place for magnitudes.
    """
    found = []
    for weight in adapter.weights:
        if not all(all_finite(tensor) for tensor in weight.tensors.values()):
            problems.append(f"{weight.name!r} holds NaN or infinity")
        elif isinstance(weight.variant, Full):
            continue
        elif weight.entry.slices:
            problems.append(f"{weight.name!r}: slices {', '.join(weight.entry.slices)} of a weight have no place")
        elif weight.entry.parameter != "weight" and not weight.stacked:
            problems.append(f"{weight.name!r}: only a layer's own weight has a place")
        else:
            factors = _factors(weight, problems, dora)
            found += [] if factors is None else [factors]
    drops = {getattr(factors.weight.variant, "dropout", 0) for factors in found} - {0}
    if drops:
        lost.append(f"dropout {', '.join(map(str, sorted(drops)))}")
    return found


def _factors(weight: AdapterWeight, problems: list[str], dora: bool) -> Factors | None:
    variant, tensors = weight.variant, weight.tensors
    fields = variant.peft_fields()
    plain = fields["peft_type"] == "LORA" and (not fields.get("use_dora") or dora)
    if plain and {"A", "B"} <= tensors.keys():
        rank = fields["r"]
        alpha = fields["lora_alpha"] * (math.sqrt(rank) if fields["use_rslora"] else 1)
        return Factors(weight, tensors["A"].detach(), tensors["B"].detach(), alpha, rank)
    try:
        B, A = weight.product()
    except LorakitError as error:
        problems.append(str(error))
        return None
    if tensors["A"].dim() > 2 and not weight.stacked:
        problems.append(f"{weight.name!r}: {type(variant).__name__} of a convolution; write it as plain LoRA first")
        return None
    rank = A.shape[-2]
    return Factors(weight, A.detach(), B.detach(), float(rank), rank)


def folded(factors: Factors, alpha: float, rank: int, rounded: list[str]) -> Factors:
    """The same ΔW with another alpha and a rank that is not smaller: the scale in B, zeros in A and B.

    Factors of 16 bits become 32-bit ones where the change of scale would be rounded; what is rounded even so is noted.
    """
    ratio = factors.scale / (alpha / rank)
    A, B, inner = factors.A, factors.B, 1 if factors.weight.stacked else 0
    if ratio != 1:
        exact = B.double() * ratio
        dtype = (
            B.dtype if torch.equal(exact.to(B.dtype).double(), exact) else torch.promote_types(B.dtype, torch.float32)
        )
        A, B = A.to(dtype), exact.to(dtype)
        if not torch.equal(B.double(), exact):
            rounded.append(factors.weight.name)
    if rank != factors.rank:
        more = rank - factors.rank
        A = torch.cat([A, A.new_zeros(*A.shape[:inner], more, *A.shape[inner + 1 :])], inner)
        B = torch.cat([B, B.new_zeros(*B.shape[: inner + 1], more, *B.shape[inner + 2 :])], inner + 1)
    return factors._replace(A=A, B=B, alpha=alpha, rank=rank)


def one_alpha(factors: list[Factors], lost: list[str]) -> tuple[float, list[Factors]]:
    """The same for formats with one alpha, whose scale is alpha over the rank of each tensor."""
    alpha = Counter(each.alpha for each in factors).most_common(1)[0][0]
    rounded: list[str] = []
    result = [each if each.alpha == alpha else folded(each, alpha, each.rank, rounded) for each in factors]
    _note(rounded, lost)
    return alpha, result


def one_rank(factors: list[Factors], lost: list[str]) -> tuple[float, int, list[Factors]]:
    """The same for formats with one alpha and one rank: the largest, with zeros in the others."""
    rank = max(each.rank for each in factors)
    scale = Counter(each.scale for each in factors).most_common(1)[0][0]
    alike = [each.alpha for each in factors if each.scale == scale and each.rank == rank]
    alpha = alike[0] if alike else scale * rank
    rounded: list[str] = []
    same = [each.rank == rank and each.alpha == alpha for each in factors]
    result = [each if ok else folded(each, alpha, rank, rounded) for each, ok in zip(factors, same, strict=True)]
    if any(each.rank != rank for each in factors):
        lost.append(f"ranks below {rank}, which are filled up with zeros")
    _note(rounded, lost)
    return alpha, rank, result


def _note(rounded: list[str], lost: list[str]) -> None:
    if rounded:
        lost.append(
            f"the last bit of {len(rounded)} factors B, in which a scale of their own was folded: {rounded[0]!r}, …"
        )
