"""diffusers' files, `pytorch_lora_weights.safetensors`, of today and of before, and the dotted ones of ComfyUI.

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight            today's, as PEFT has it
    unet.….attn1.to_q.lora.down.weight                               before
    unet.….attn1.processor.to_q_lora.down.weight                     before that
    text_encoder.….q_proj.lora_linear_layer.down.weight              before, of text encoders
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight       ComfyUI, ai-toolkit; or lokr_w1, hada_w1_a, …
    transformer_blocks.0.attn.to_q.lora_down.weight                  the same without a prefix

Where there is neither an alpha nor a config in the metadata, the scale is 1: so diffusers defines it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import LorakitError
from lorakit.formats.addend import addends_of, with_biases
from lorakit.formats.content import Content
from lorakit.formats.diffusers_writing import write_dotted
from lorakit.formats.dotted import METADATA, PARTS, Family, family_of, part_of, split_key
from lorakit.formats.form import Format, Known, Written
from lorakit.formats.image import Parts, adapter_of, weights_of, whole
from lorakit.formats.names import Names, of_part
from lorakit.patterns import some
from lorakit.peft.fields import header_from_peft
from lorakit.storage import parse_json_object
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, LoHa, LoKr, LoRA

_TEXT_ROOT = "text_model."


def read(content: Content, known: Known) -> Adapter:
    """The adapter; the first word of a name may be the model of a pipeline that it is of."""
    groups: dict[str, Parts] = {}
    problems: list[str] = []
    weights: list[AdapterWeight] = []
    biases: Parts = {}
    for key, tensor in content.tensors.items():
        path, role = split_key(key)
        if role == "whole":
            weights.append(whole(*path.rpartition(".")[::2], tensor))
        elif role == "addend":
            biases[path] = tensor
        elif role is None:
            problems.append(f"{key!r} is a part that outputs depend on and that cannot be held here")
        elif role in groups.setdefault(path, {}):
            problems.append(f"{key!r} is there under another name, too")
        else:
            groups[path][role] = tensor
    alphas = any("alpha" in parts for parts in groups.values())
    style = {
        "scale": "alpha" if alphas else "config" if METADATA in content.metadata else "none",
        "factors": "kohya" if any(".lora_down." in key or ".lora_up." in key for key in content.tensors) else "peft",
        "alpha": next((str(p["alpha"].dtype).removeprefix("torch.") for p in groups.values() if "alpha" in p), None),
    }
    weights = [*weights_of(groups, problems), *weights]
    if METADATA in content.metadata and not problems:
        weights = _with_config(content, weights, problems)
        problems += [f"its metadata has {METADATA}, and it has tensors of alpha, too"] * alphas
    weights += addends_of(biases, weights, problems)
    more = {"format": family_of(content), "naming": "diffusers", "facts": {"diffusers": style}}
    return adapter_of(content, weights, problems, **more)


def _with_config(content: Content, weights: list[AdapterWeight], problems: list[str]) -> list[AdapterWeight]:
    """The weights with the ranks and scales of the config of PEFT in the metadata: one, or one for each model."""
    where = f"{METADATA} of {content.file}"
    config = parse_json_object(content.metadata[METADATA], where)
    by_part = {word: config_of(config, word) for word in PARTS}
    made = []
    for part in dict.fromkeys(part_of(weight.entry.path) for weight in weights):
        mine = [weight for weight in weights if part_of(weight.entry.path) == part]
        own = by_part.get(part) or (config if "r" in config or "peft_type" in config else {})
        if not own:
            problems.append(f"its {METADATA} says nothing of {part!r}")
            continue
        if any(isinstance(weight.variant, LoHa | LoKr) for weight in mine):
            problems.append(f"its {METADATA} is of LoRA, and it holds factors of LoHa or LoKr")
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
    config = {key: value for key, value in config.items() if key != "lora_bias"}  # told by the tensors
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


def _word(path: str) -> str:
    """The same, or ComfyUI's one word for all of them."""
    return "diffusion_model" if path.startswith("diffusion_model.") else part_of(path)


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
    problems: list[str] = []
    weights = with_biases(best, names, problems)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{adapter.name!r} ({adapter.format}) does not fit the model:{listed}")
    return found.with_weights(weights, naming="", facts=facts)


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


def _recognises(family: Family) -> Any:
    return lambda content: family_of(content) == family


def _form(family: Family, title: str) -> Format:
    def write(adapter: Adapter, known: Known) -> Written:
        return write_dotted(adapter, known, family)

    return Format(
        family, title, _recognises(family), read, write, takes=("part",), asks=("part",), resolve={"diffusers": resolve}
    )


DIFFUSERS = _form("diffusers", "diffusers")
DIFFUSERS_OLD = _form("diffusers-old", "diffusers before it used PEFT")
COMFYUI = _form("comfyui", "ComfyUI and ai-toolkit: dotted names, after diffusion_model")
