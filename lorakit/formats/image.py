"""What adapters of image models share: what the tensors of one weight are called after its name, and what they mean.

The names are those of sd-scripts, LyCORIS, OneTrainer, diffusers and ComfyUI; what they mean is LyCORIS' definition
(arXiv:2309.14859), in which alpha/r is the scale, and an alpha of 0, or none, is r.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.lycoris import alpha_of, contracted, factors_of_diff, kronecker, magnitude_of
from lorakit.header import Header, WeightEntry
from lorakit.storage import name_of
from lorakit.values.adapter import Adapter, check
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, Full, LoHa, LoKr, LoRA, Variant

ROLES: Mapping[str, str] = {
    **{f"lora_{end}.weight": role for end, role in (("down", "A"), ("up", "B"), ("A", "A"), ("B", "B"))},
    **{f"lora_{role}.default.weight": role for role in "AB"},
    **{f"{word}.{end}.weight": r for word in ("lora", "lora_linear_layer") for end, r in (("down", "A"), ("up", "B"))},
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    **{name: name for name in ("alpha", "dora_scale", "diff", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2")},
    **{name: name for name in (*LoHa.file_names.values(), *LoKr.file_names.values())},
}
"""What a tensor is, by the end of its key."""
_BESIDE = frozenset({"alpha", "dora_scale", "magnitude"})

Parts = dict[str, Tensor]
"""The tensors of one weight by their roles."""


def is_plain(content: Content) -> bool:
    """Whether a file may be one of image models: neither ours nor PEFT's, which say so themselves."""
    if "lorakit" in content.metadata or content.container not in ("safetensors", "torch"):
        return False
    return content.config is None or "peft_type" not in content.config


def ending_of(rest: str) -> str | None:
    """The end of a key that is a role, of all that comes after the weight's name; None if none is."""
    return next((end for end in ROLES if rest == end or rest.endswith("." + end)), None)


def weights_of(groups: Mapping[str, Parts], problems: list[str]) -> list[AdapterWeight]:
    """The weights that these tensors make up; what is wrong with them is added to the problems."""
    weights = []
    for path, parts in groups.items():
        try:
            weights.append(_weight(path, parts))
        except LorakitError as error:
            problems.append(f"{path!r}: {error}")
    return weights


def whole(path: str, parameter: str, value: Tensor) -> AdapterWeight:
    """A parameter that the file holds as a whole."""
    return AdapterWeight(_entry(path, parameter), Full(), {"value": value})


def adapter_of(content: Content, weights: Sequence[AdapterWeight], problems: list[str], **more: Any) -> Adapter:
    """The adapter of these weights, of which what most have is the adapter's variant.

    Raises:
        LorakitError: there are problems, or more in the tensors: all of them in one error.
    """
    check(str(content.path), problems)
    counted = Counter(weight.variant for weight in weights).most_common(1)
    variant = counted[0][0] if counted else LoRA(1)
    facts, left_out = more.pop("facts", {}), more.pop("left_out", ())
    entries = tuple(
        weight.entry._replace(variant=None if weight.variant == variant else weight.variant) for weight in weights
    )
    header = Header(name_of(content.path), variant, entries, ours=False, facts=facts)
    made = Adapter(header.name, variant, tuple(weights), ours=False, facts=facts)
    if len({(e.path, e.parameter) for e in entries}) < len(entries):
        raise LorakitError(f"{content.path} holds one weight under two names, and which is meant is not known")
    return replace(Adapter.of(header, made.state_dict(), str(content.path)), left_out=tuple(left_out), **more)


def matrix_shape(weight: AdapterWeight) -> tuple[int, int] | None:
    """D and k of the weight that an adapter's tensors are for, as they say it; None if they do not."""
    t = weight.tensors
    match weight.variant:
        case LoHa():
            return t["B1"].shape[0], t["A1"].flatten(1).shape[1]
        case LoKr():
            w1, w2 = (_outer(t, name) for name in ("w1", "w2"))
            return w1[0] * w2[0], w1[1] * w2[1]
        case _:
            if "A" not in t or "B" not in t:
                return None
            return t["B"].shape[0], t["A"].flatten(1).shape[1]


def _outer(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name in tensors:
        return tensors[name].shape[0], tensors[name].flatten(1).shape[1]
    return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].flatten(1).shape[1]


def _entry(path: str, parameter: str = "weight") -> WeightEntry:
    return WeightEntry(path, parameter, None, None, None, None)


def _weight(path: str, parts: Parts) -> AdapterWeight:
    """One weight from its tensors.

    Raises:
        LorakitError: what is wrong with them, without the weight's name.
    """
    kinds = {role.split("_")[0] if "_" in role else role for role in parts.keys() - _BESIDE}
    kind = "lora" if kinds & {"A", "B", "mid"} else next(iter(kinds), "")
    if not kinds <= ({"A", "B", "mid"} if kind == "lora" else {kind}):
        raise LorakitError(f"it has {', '.join(sorted(parts))}, which are of several methods")
    if not kinds:
        raise LorakitError(f"it has {', '.join(sorted(parts))} and no factors")
    for role, tensor in parts.items():
        if role != "alpha" and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            raise LorakitError(f"its {role} is of dtype {tensor.dtype}; floats of 16 bits or more are needed")
        if role != "alpha" and not tensor.numel():
            raise LorakitError(f"its {role} of shape {tuple(tensor.shape)} is empty")
    variant, tensors = _METHODS[kind](parts)
    return AdapterWeight(_entry(path), variant, tensors)


def _lora(parts: Parts) -> tuple[Variant, Mapping[str, Tensor]]:
    missing = [name for name in ("A", "B") if name not in parts]
    if missing:
        raise LorakitError(f"it lacks the factor {missing[0]} ({'down' if missing[0] == 'A' else 'up'})")
    A, B = parts["A"], parts["B"]
    shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
    if A.dim() < 2 or A.dim() != B.dim() or any(size != 1 for size in B.shape[2:]):
        raise LorakitError(f"{shapes} are no two factors of one weight")
    if "mid" in parts:  # LyCORIS' Tucker form: ΔW = up·mid·down, of which mid·down is one kernel
        A, B = contracted(parts["mid"], A), B.to(torch.promote_types(B.dtype, torch.float32))
    if A.shape[0] != B.shape[1]:
        raise LorakitError(f"{shapes} are of different ranks")
    alpha = alpha_of(parts.get("alpha"))
    factors = {"A": A, "B": B}
    if "dora_scale" not in parts and "magnitude" not in parts:
        return LoRA(A.shape[0], alpha), factors
    if "dora_scale" in parts and "magnitude" in parts:
        raise LorakitError("it has both dora_scale and lora_magnitude_vector")
    value = parts.get("magnitude")
    return DoRA(A.shape[0], alpha), {**factors, "magnitude": magnitude_of(parts, B, A) if value is None else value}


def _hadamard(parts: Parts) -> tuple[Variant, Mapping[str, Tensor]]:
    _check_no_dora(parts, "LoHa")
    tensors = {name: parts[key] for name, key in LoHa.file_names.items() if key in parts}
    missing = [key for key in LoHa.file_names.values() if key not in parts]
    if missing:
        raise LorakitError(f"it lacks {', '.join(missing)}")
    for i in (1, 2):
        core, B = parts.get(f"hada_t{i}"), tensors[f"B{i}"]
        if core is not None:  # ΔW = Σ core[p, q]·a[p]·b[q] with a (r, d), b (r, k), core (r, r, *kernel)
            if B.dim() != 2:
                raise LorakitError(f"its hada_w{i}_a {tuple(B.shape)} is no matrix")
            tensors[f"A{i}"] = contracted(core, tensors[f"A{i}"]).flatten(1)
            tensors[f"B{i}"] = B.to(tensors[f"A{i}"].dtype).mT.contiguous()
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise LorakitError("it has one of hada_t1 and hada_t2")
    rank = tensors["A1"].shape[0] if tensors["A1"].dim() else 0
    if any(tensor.dim() != 2 for tensor in tensors.values()) or any(
        tensors[f"B{i}"].shape[1] != rank or tensors[f"A{i}"].shape[0] != rank for i in (1, 2)
    ):
        raise LorakitError(", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items()) + " are no four factors")
    if tensors["B1"].shape != tensors["B2"].shape or tensors["A1"].shape != tensors["A2"].shape:
        raise LorakitError("its two products are of different shapes")
    return LoHa(rank, alpha_of(parts.get("alpha"))), tensors


def _kronecker(parts: Parts) -> tuple[Variant, Mapping[str, Tensor]]:
    _check_no_dora(parts, "LoKr")
    return kronecker(parts)


def _diff(parts: Parts) -> tuple[Variant, Mapping[str, Tensor]]:
    beside = [role for role in parts if role != "diff"]
    if beside:
        raise LorakitError(f"it has {', '.join(beside)} beside a whole ΔW, where that has no meaning")
    A, B = factors_of_diff(parts["diff"])
    return LoRA(A.shape[0]), {"A": A, "B": B}


def _check_no_dora(parts: Parts, name: str) -> None:
    if parts.keys() & {"dora_scale", "magnitude"}:
        raise LorakitError(
            f"it has a DoRA magnitude on {name}, which rescales the whole weight; it is held on LoRA only"
        )


_METHODS = {"lora": _lora, "hada": _hadamard, "lokr": _kronecker, "diff": _diff}
