"""Keys with dotted names: which family a file is of, and what of a key is the layer's name."""

import re
from typing import Literal

from lorakit.formats.addend import END
from lorakit.formats.cloneofsimo import is_cloneofsimo
from lorakit.formats.content import Content
from lorakit.formats.image import ROLES, ending_of, is_plain
from lorakit.formats.kohya import is_kohya
from lorakit.formats.xlabs import is_xlabs
from lorakit.header import PREFIX

Family = Literal["diffusers", "diffusers-old", "comfyui"]
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
METADATA = "lora_adapter_metadata"
"""The key of a config of PEFT in the metadata, as JSON."""
_OLD = re.compile(r"[._]lora\.(down|up)\.weight$|\.lora_linear_layer\.(down|up)\.weight$")
_OTHERS = re.compile(r"\.(lora_down|lora_up|lora_mid)\.weight$|\.(lokr_[wt][12](_[ab])?|hada_[wt][12](_[ab])?)$")
_NEW = re.compile(r"\.lora_[AB](\.default)?\.weight$")
_PROCESSOR = re.compile(r"^(?:(.+)\.)?processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_TEXT = re.compile(r"^(.+)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LANGUAGE = re.compile(
    r"^(?!(?:text_encoders?(?:_[23])?|text_model|unet|diffusion_model|transformer_2|prior|controlnet)\.)"
    r"(?!transformer\.(?!h\.|encoder\.layers\.))"  # the transformer of a pipeline, and not that of GPT-2 or ChatGLM
    r"(?:.*\.)?(?:layers?|h)\.\d+\.(?:.*\.)?"
    r"(?:[qkvo]_proj|(?:gate|up|down|gate_up|qkv)_proj|W_pack|Wqkv|w[qkvo]|c_attn|c_fc|query_key_value|query|value)"
    r"\.lora_[AB](?:\.[^.]+)?\.weight$"
)
"""Layers of language models, which no pipeline of diffusers trains under bare names."""
_OWN = ("weight", "bias", "scale")
"""What a parameter is called that is held as a whole, such as those of norms."""


def family_of(content: Content) -> Family | None:
    """Which of the dotted families a file is of; None if it is none of them."""
    if not is_plain(content) or any(PREFIX in key for key in content.tensors) or is_language(content):
        return None
    if is_kohya(content) or is_xlabs(content) or is_cloneofsimo(content):
        return None
    keys = list(content.tensors)
    if any(_OLD.search(key) for key in keys):
        return "diffusers-old"
    dotted = any(_OTHERS.search(key) for key in keys)
    new = any(_NEW.search(key) for key in keys)
    if dotted or (new and any(key.startswith("diffusion_model.") for key in keys)):
        return "comfyui"
    return "diffusers" if new else None


def is_language(content: Content) -> bool:
    """Whether these are factors of a language model, as PEFT calls them, that nothing says the scale of."""
    if not is_plain(content) or METADATA in content.metadata:
        return False
    keys = content.tensors
    return any(_LANGUAGE.match(key) for key in keys) and not any(key.endswith(".alpha") for key in keys)


def split_key(key: str) -> tuple[str, str | None]:
    """The layer's name and the role.

    It is "whole" of a parameter as a whole, of which the name is the parameter's, and "addend" of a bias of B.
    """
    found = _PROCESSOR.match(key)
    if found is not None:
        layer = ".".join(filter(None, (found[1], "to_out.0" if found[2] == "to_out" else found[2])))
        return layer, "A" if found[3] == "down" else "B"
    found = _TEXT.match(key)
    if found is not None:  # of text encoders, under the names that the UNet's attention has
        name = _TEXT_NAMES[found[2]] if ".self_attn" in found[1] else found[2].replace("to_out", "to_out.0")
        return f"{found[1]}.{name}", "A" if found[3] == "down" else "B"
    if key.endswith("." + END):
        return key.removesuffix("." + END), "addend"
    end = ending_of(key)
    if end is not None and end != key:
        layer = key.removesuffix("." + end).replace(".processor.", ".")
        return layer, ROLES[end]
    path, _, own = key.rpartition(".")
    if own in _OWN and path and not re.search(r"(^|\.)(lora|lokr|hada|oft|diff|ia3|vera|dora)[_.A-Z]|(^|\.)lora", key):
        return key, "whole"
    return key, None


def part_of(path: str) -> str:
    """The model of a pipeline that a name begins with; "" if it is the layer's alone."""
    first = path.partition(".")[0]
    return first if first in PARTS else ""
