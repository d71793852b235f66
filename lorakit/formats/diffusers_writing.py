"""Files of diffusers and of ComfyUI, written."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.addend import END, is_addend
from lorakit.formats.dotted import METADATA, PARTS, Family, part_of
from lorakit.formats.form import Known, Written, no_place
from lorakit.formats.image_writing import alpha_tensor, dropped, safetensors_of, scaled, tensors_of
from lorakit.header import Header
from lorakit.patterns import some
from lorakit.peft.config import peft_config
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, Full, LoHa, LoKr, Variant


def write_dotted(adapter: Adapter, known: Known, family: Family) -> Written:
    """One `.safetensors` file.

    Scales are folded into B, for the scale of such a file is 1, unless the file it came from had them apart.
    """
    facts = adapter.facts.get("diffusers", {})
    prefix = _prefix_to_write(adapter, facts, known.part, family)
    scale = facts.get("scale") if family != "diffusers-old" else "none"
    apart = "alpha" if family == "comfyui" and scale != "none" else scale if scale in ("alpha", "config") else None
    style: Literal["kohya", "peft"] = "kohya" if family == "comfyui" and facts.get("factors") == "kohya" else "peft"
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    addends = {f"{prefix}{w.entry.path}": w.tensors["value"] for w in adapter.weights if is_addend(w)}
    for weight in adapter.weights:
        path = f"{prefix}{weight.entry.path}"
        if is_addend(weight):
            continue
        if isinstance(weight.variant, Full) and family != "diffusers-old":
            tensors[f"{prefix}{weight.name}"] = weight.tensors["value"]
            continue
        found = None if _unheld(weight, family, problems) else tensors_of(weight, style, problems)
        if found is None:
            continue
        parts, alpha = found
        factor = next((name for name in ("lora_B.weight", "lora_up.weight") if name in parts), None)
        if factor is not None and apart is None:
            parts, alpha = _folded(parts, factor, alpha), parts[factor].shape[1]
        elif apart == "alpha" or factor is None:
            parts["alpha"] = alpha_tensor(alpha, _dtype(facts.get("alpha"), next(iter(parts.values())).dtype))
        if path in addends and family != "diffusers-old" and factor and alpha == parts[factor].shape[1]:
            parts[END] = addends.pop(path)  # its scale is in it
        for end, tensor in parts.items():
            tensors[f"{path}.{_old(end, path) if family == 'diffusers-old' else end}"] = tensor
    problems += [f"'{path}.bias' is added to, with a scale that {family} has no place for" for path in addends]
    no_place(family, problems)
    metadata = _config_metadata(adapter, prefix) if apart == "config" else {}
    return Written(safetensors_of(adapter.name, tensors, metadata), dropped(adapter))


def _unheld(weight: AdapterWeight, family: Family, problems: list[str]) -> bool:
    """Whether a family has no place for what a weight has, which the problems then say."""
    if isinstance(weight.variant, LoHa | LoKr) and family != "comfyui":
        problems.append(f"{weight.name!r} is of {type(weight.variant).__name__}: write it as kohya or comfyui")
    elif isinstance(weight.variant, DoRA) and family == "diffusers-old":
        problems.append(f"{weight.name!r} is of DoRA, which came later: write it as diffusers")
    else:
        return False
    return True


def _folded(parts: dict[str, Tensor], up: str, alpha: float) -> dict[str, Tensor]:
    """The scale in B; all are of one dtype."""
    made = dict(parts)
    made[up] = scaled(parts[up], alpha / parts[up].shape[1])
    return {name: tensor.to(made[up].dtype) for name, tensor in made.items()}


def _dtype(name: str | None, otherwise: Any) -> Any:
    kept = getattr(torch, name or "", None)
    return kept if isinstance(kept, torch.dtype) else otherwise


def _old(end: str, path: str) -> str:
    """The end of a key as it was before: apart for text encoders."""
    word = "lora_linear_layer" if path.startswith("text_encoder") else "lora"
    return {"lora_A.weight": f"{word}.down.weight", "lora_B.weight": f"{word}.up.weight"}[end]


def _config_metadata(adapter: Adapter, prefix: str) -> dict[str, str]:
    """PEFT's config for each model, as diffusers keeps it."""
    config: dict[str, Any] = {}
    parts: dict[str, list[AdapterWeight]] = {}
    for weight in adapter.weights:
        part = prefix.rstrip(".") or part_of(weight.entry.path)
        cut = "" if prefix else f"{part}." if part else ""
        entry = weight.entry._replace(path=weight.entry.path.removeprefix(cut))
        parts.setdefault(part, []).append(weight._replace(entry=entry))
    for part, mine in parts.items():
        value = replace(adapter, weights=tuple(mine), variant=_common(mine), facts={})
        header = Header("", value.variant, value.header.weights, ours=False)
        one = peft_config(header, value.state_dict())
        config |= {f"{part}.{key}" if part else key: each for key, each in one.items()}
    return {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _common(weights: list[AdapterWeight]) -> Variant:
    variants = [weight.variant for weight in weights if not isinstance(weight.variant, Full)]
    return max(variants or [weights[0].variant], key=variants.count)


def _prefix_to_write(adapter: Adapter, facts: Mapping[str, Any], part: str | None, family: Family) -> str:
    """What comes before the names: nothing where they have it already."""
    if adapter.naming == "diffusers":
        return ""
    if adapter.naming not in ("", "parts"):
        raise LorakitError(f"{adapter.name!r} has the names of {adapter.format}: name the model's layers first")
    part = part or facts.get("part") or ("diffusion_model" if family == "comfyui" else None)
    if part is None or (family != "comfyui" and part not in PARTS):
        raise LorakitError(f"writing {adapter.name!r} as {family} needs part=..., which model it is of: {some(PARTS)}")
    return f"{part}."
