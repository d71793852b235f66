"""diffusers' files, `pytorch_lora_weights.safetensors`, of today and of before, and the dotted ones of ComfyUI.

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight            today's, as PEFT has it
    unet.….attn1.to_q.lora.down.weight                               before
    unet.….attn1.processor.to_q_lora.down.weight                     before that
    text_encoder.….q_proj.lora_linear_layer.down.weight              before, of text encoders
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight       ComfyUI, ai-toolkit; or lokr_w1, hada_w1_a, …
    transformer_blocks.0.attn.to_q.lora_down.weight                  the same without a prefix

Where there is neither an alpha nor a config in the metadata, the scale is 1: so diffusers defines it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lorakit.adapter import Adapter, AdapterWeight
from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.dotted import family_of, split_key
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.image import Parts, adapter_of, weights_of, whole
from lorakit.formats.image_writing import alpha_tensor, dropped, safetensors_of, scaled, tensors_of
from lorakit.formats.names import Names, of_part
from lorakit.header import Header
from lorakit.patterns import some
from lorakit.peft_config import peft_config
from lorakit.peft_fields import header_from_peft
from lorakit.storage import parse_json_object
from lorakit.variants import DoRA, Full, LoHa, LoKr, LoRA, Variant

PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
)
"""The models of a pipeline, which the first word of a name is."""
_METADATA = "lora_adapter_metadata"
_TEXT_ROOT = "text_model."

Family = Literal["diffusers", "diffusers-old", "comfyui"]


def read(content: Content, known: Known) -> Adapter:
    """The adapter; the first word of a name may be the model of a pipeline that it is of."""
    groups: dict[str, Parts] = {}
    problems: list[str] = []
    weights: list[AdapterWeight] = []
    for key, tensor in content.tensors.items():
        path, role = split_key(key)
        if role == "whole":
            weights.append(whole(*path.rpartition(".")[::2], tensor))
        elif role is None:
            problems.append(f"{key!r} is a part that outputs depend on and that cannot be held here")
        elif role in groups.setdefault(path, {}):
            problems.append(f"{key!r} is there under another name, too")
        else:
            groups[path][role] = tensor
    alphas = any("alpha" in parts for parts in groups.values())
    style = {
        "scale": "alpha" if alphas else "config" if _METADATA in content.metadata else "none",
        "factors": "kohya" if any(".lora_down." in key or ".lora_up." in key for key in content.tensors) else "peft",
        "alpha": next((str(p["alpha"].dtype).removeprefix("torch.") for p in groups.values() if "alpha" in p), None),
    }
    weights = [*weights_of(groups, problems), *weights]
    if _METADATA in content.metadata and not problems:
        weights = _with_config(content, weights, problems)
        problems += [f"its metadata has {_METADATA}, and it has tensors of alpha, too"] * alphas
    more = {"format": family_of(content), "naming": "diffusers", "facts": {"diffusers": style}}
    return adapter_of(content, weights, problems, **more)


def _with_config(content: Content, weights: list[AdapterWeight], problems: list[str]) -> list[AdapterWeight]:
    """The weights with the ranks and scales of the config of PEFT in the metadata: one, or one for each model."""
    where = f"{_METADATA} of {content.file}"
    config = parse_json_object(content.metadata[_METADATA], where)
    by_part = {word: config_of(config, word) for word in PARTS}
    made = []
    for part in dict.fromkeys(_part(weight.entry.path) for weight in weights):
        mine = [weight for weight in weights if _part(weight.entry.path) == part]
        own = by_part.get(part) or (config if "r" in config or "peft_type" in config else {})
        if not own:
            problems.append(f"its {_METADATA} says nothing of {part!r}")
            continue
        if any(isinstance(weight.variant, LoHa | LoKr) for weight in mine):
            problems.append(f"its {_METADATA} is of LoRA, and it holds factors of LoHa or LoKr")
            continue
        made += _configured({"peft_type": "LORA", **own}, part if by_part.get(part) else "", mine, content)
    return made


def config_of(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a config for several models says of one."""
    return {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}


def _configured(
    config: Mapping[str, Any], part: str, weights: list[AdapterWeight], content: Content
) -> list[AdapterWeight]:
    """Weights of one model with the variants that its config gives."""
    cut = f"{part}." if part else ""
    ours = [weight for weight in weights if not isinstance(weight.variant, Full)]
    # the config's patterns are of names without the model's
    bare = [weight._replace(entry=weight.entry._replace(path=weight.entry.path.removeprefix(cut))) for weight in ours]
    value = Adapter("", LoRA(1), tuple(bare))
    try:
        header = header_from_peft(config, value.state_dict(), content.path)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise LorakitError(f"{content.path}: the config in its metadata is damaged: {error}") from None
    variants = {entry.path: header.variant_of(entry) for entry in header.weights}
    found = [weight for weight in weights if isinstance(weight.variant, Full)]
    for weight, own in zip(ours, bare, strict=True):
        variant = variants.get(own.entry.path)
        if variant is None or weight.tensors.keys() != variant.file_names.keys():
            raise LorakitError(f"{content.path}: the config in its metadata is not of the tensors of {weight.name!r}")
        found.append(weight._replace(variant=variant))
    return found


def _part(path: str) -> str:
    """The model of a pipeline that a name begins with; "" if it is the layer's alone."""
    first = path.partition(".")[0]
    return first if first in PARTS else ""


def _word(path: str) -> str:
    """The same, or ComfyUI's one word for all of them."""
    return "diffusion_model" if path.startswith("diffusion_model.") else _part(path)


def resolve(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The adapter of one model, with the names of its layers.

    Raises:
        LorakitError: it is about several models and it is not said which is meant.
    """
    layers = set(names.layers)
    words = dict.fromkeys(_word(weight.entry.path) for weight in adapter.weights)
    part = known.part
    if part is None and not any(weight.entry.path in layers for weight in adapter.weights):
        part = _fitting(adapter, list(words), layers)
    elif part is not None and part not in words and len(words) == 1:  # ComfyUI has one word for all models
        part = next((word for word in words if word == "diffusion_model"), "" if "" in words else part)
    found = of_part(adapter, names, part) if part else adapter
    best = max(_rooted(found.weights), key=lambda way: sum(weight.entry.path in layers for weight in way))
    facts = {**found.facts, "diffusers": {**found.facts.get("diffusers", {}), "part": part or known.part}}
    return found.with_weights(best, naming="", facts=facts)


def _fitting(adapter: Adapter, words: list[str], layers: set[str]) -> str | None:
    """The one model that the layers are of, of those that names begin with; if none fits, the only one there is."""
    scores = {}
    for word in words:
        cut = f"{word}." if word else ""
        mine = [_moved(weight, cut, "") for weight in adapter.weights if _word(weight.entry.path) == word]
        scores[word] = max(sum(weight.entry.path in layers for weight in way) for way in _rooted(mine))
    fitting = [word for word, score in scores.items() if score]
    if len(fitting) == 1 or (not fitting and len(words) == 1):
        return (fitting or words)[0]
    raise LorakitError(f"{adapter.name!r} is about {some(words)}: say which is meant with part=...")


def _rooted(weights: Sequence[AdapterWeight]) -> list[list[AdapterWeight]]:
    """The weights as they are, and with the other roots that they may have in the model."""
    return [[_moved(w, cut, add) for w in weights] for cut, add in (("", ""), (_TEXT_ROOT, ""), ("", _TEXT_ROOT))]


def _moved(weight: AdapterWeight, cut: str, add: str) -> AdapterWeight:
    """The weight under another root: encoders of CLIP once had one."""
    return weight._replace(entry=weight.entry._replace(path=add + weight.entry.path.removeprefix(cut)))


def _write(adapter: Adapter, known: Known, family: Family) -> Written:
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
    for weight in adapter.weights:
        path = f"{prefix}{weight.entry.path}"
        if isinstance(weight.variant, Full) and family != "diffusers-old":
            tensors[f"{prefix}{weight.name}"] = weight.tensors["value"]
            continue
        if isinstance(weight.variant, LoHa | LoKr) and family != "comfyui":
            problems.append(f"{weight.name!r} is of {type(weight.variant).__name__}: write it as kohya or comfyui")
            continue
        if isinstance(weight.variant, DoRA) and family == "diffusers-old":
            problems.append(f"{weight.name!r} is of DoRA, which came later: write it as diffusers")
            continue
        found = tensors_of(weight, style, problems)
        if found is None:
            continue
        parts, alpha = found
        factor = next((name for name in ("lora_B.weight", "lora_up.weight") if name in parts), None)
        if factor is not None and apart is None:
            parts = _folded(parts, factor, alpha)
        elif apart == "alpha" or factor is None:
            kept = next((t.dtype for t in parts.values()), None)
            assert kept is not None
            parts["alpha"] = alpha_tensor(alpha, _dtype(facts.get("alpha"), kept))
        for end, tensor in parts.items():
            tensors[f"{path}.{_old(end, path) if family == 'diffusers-old' else end}"] = tensor
    no_place(family, problems)
    metadata = _config_metadata(adapter, prefix) if apart == "config" else {}
    return Written(safetensors_of(adapter.name, tensors, metadata), dropped(adapter))


def _folded(parts: dict[str, Tensor], up: str, alpha: float) -> dict[str, Tensor]:
    """The scale in B; all are of one dtype."""
    made = dict(parts)
    made[up] = scaled(parts[up], alpha / parts[up].shape[1])
    return {name: tensor.to(made[up].dtype) for name, tensor in made.items()}


def _dtype(name: str | None, otherwise: Any) -> Any:
    import torch

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
        part = prefix.rstrip(".") or _part(weight.entry.path)
        cut = "" if prefix else f"{part}." if part else ""
        entry = weight.entry._replace(path=weight.entry.path.removeprefix(cut))
        parts.setdefault(part, []).append(weight._replace(entry=entry))
    for part, mine in parts.items():
        value = replace(adapter, weights=tuple(mine), variant=_common(mine), facts={})
        header = Header("", value.variant, value.header.weights, ours=False)
        one = peft_config(header, value.state_dict())
        config |= {f"{part}.{key}" if part else key: each for key, each in one.items()}
    return {_METADATA: json.dumps(config, indent=2, sort_keys=True)}


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


def _recognises(family: Family) -> Any:
    return lambda content: family_of(content) == family


def _form(family: Family, title: str) -> Format:
    def write(adapter: Adapter, known: Known) -> Written:
        return _write(adapter, known, family)

    return Format(family, title, _recognises(family), read, write, takes=("part",), resolve={"diffusers": resolve})


DIFFUSERS = _form("diffusers", "diffusers")
DIFFUSERS_OLD = _form("diffusers-old", "diffusers before it used PEFT")
COMFYUI = _form("comfyui", "ComfyUI and ai-toolkit: dotted names, after diffusion_model")
