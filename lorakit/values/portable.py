"""One rank and one scale for all: adapters for engines that know no others, vLLM and llama.cpp."""

from dataclasses import replace

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.patterns import some
from lorakit.values.adapter import Adapter, check_known
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, Full, LoRA, Rows

_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""


def portable(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """The same ΔW as LoRA of one rank R and the scale 1 everywhere, and what engines are known to say to it.

    Every scale is folded into B, all factors are filled up with zeros to the largest rank R, and alpha is R. vLLM
    scales all weights by the one r and lora_alpha of the config, and llama.cpp by alpha / rank of the tensors: patterns
    and rsLoRA are lost on them without a word.

    Returns:
        The adapter, B in 32 bits or more where a scale was folded into it, and notes on what an engine refuses.

    Raises:
        LorakitError: something has no such form, and engines would leave it out or refuse it: whole weights, rows,
            DoRA, products of another make. Each is named.
    """
    check_known(adapter)
    problems: list[str] = []
    if adapter.naming:
        problems.append(f"its names are those of {adapter.format}, not of a model's layers: name the model's first")
    for weight in adapter.weights if not problems else ():
        problem = _beyond_engines(weight)
        if problem is not None:
            problems.append(f"{weight.name!r} {problem}")
    folded = [] if problems else [(weight, *_folded(weight)) for weight in adapter.weights]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{adapter.name!r} has no form with one rank and one scale:{listed}")
    rank = max(A.shape[_axis(weight)] for weight, A, _ in folded)
    variant = LoRA(rank, alpha=rank, dropout=max(getattr(weight.variant, "dropout", 0.0) for weight in adapter.weights))
    weights = [
        AdapterWeight(
            weight.entry._replace(variant=None),
            variant,
            {"A": _filled(A, _axis(weight), rank), "B": _filled(B, _axis(weight) + 1, rank)},
        )
        for weight, A, B in folded
    ]
    return replace(adapter, variant=variant, weights=tuple(weights)), _notes(adapter, rank)


def _beyond_engines(weight: AdapterWeight) -> str | None:
    """Why a weight has no such form; None if it has one."""
    variant = weight.variant
    if isinstance(variant, Full):
        return "is trained as a whole: vLLM refuses modules_to_save, llama.cpp has no place for it; merge it instead"
    if isinstance(variant, Rows):
        return "has rows that are trained: neither engine has a place for them; merge it instead"
    if isinstance(variant, DoRA):
        return "is adapted by DoRA, which neither engine computes; merge it instead"
    if not {"A", "B"} <= weight.tensors.keys() or variant.product(weight.tensors, _axis(weight) + 1) is None:
        return f"is adapted by {type(variant).__name__}: {variant.no_product}; recompress it to LoRA, or merge it"
    return None


def _axis(weight: AdapterWeight) -> int:
    """The axis of A's ranks; of B's it is the next."""
    return 1 if weight.stacked else 0


def _folded(weight: AdapterWeight) -> tuple[Tensor, Tensor]:
    """A and B in their own shapes, with all of the scale in B."""
    A, B = weight.tensors["A"], weight.tensors["B"]
    scale = getattr(weight.variant, "scale", 1.0)
    if "E" in weight.tensors:  # AdaLoRA's λ
        E = weight.tensors["E"]
        A = _wide(A) * E.reshape(*E.shape[:-1], *(1 for _ in A.shape[E.dim() - 1 :]))
    return A, B if scale == 1 else _wide(B) * scale


def _wide(tensor: Tensor) -> Tensor:
    """In at least 32 bits, so that nothing is rounded to fewer."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _filled(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The factor with zeros in the ranks that it lacks."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis) if shape[axis] else factor


def _notes(adapter: Adapter, rank: int) -> tuple[str, ...]:
    """What an engine is known to refuse, loudly."""
    notes = []
    fitting = next((most for most in _RANKS_OF_VLLM if most >= rank), None)
    if fitting is None:
        notes.append(f"vLLM takes no rank above {_RANKS_OF_VLLM[-1]}, and this is of {rank}: truncate it first")
    else:
        notes.append(f"vLLM needs --max-lora-rank {fitting} for rank {rank}")
    tables = [weight.name for weight in adapter.weights if weight.lookup]
    others = [
        weight.name
        for weight in adapter.weights
        if weight.entry.parameter != "weight" or weight.entry.slices or weight.stacked
    ]
    kernels = [
        weight.name
        for weight in adapter.weights
        if weight.name not in others and (weight.tensors["A"].dim() > 2 or weight.tensors["B"].dim() > 2)
    ]
    for what, names in (("look-ups", tables), ("parameters and parts of them", others), ("convolutions", kernels)):
        if names:
            notes.append(f"vLLM and llama.cpp refuse {what} in most models: {some(names)}")
    return tuple(notes)
