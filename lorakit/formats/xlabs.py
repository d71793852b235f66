"""XLabs' adapters of Flux: attention processors' names, with Flux's own layers (Black Forest Labs) behind them.

`double_blocks.0.processor.qkv_lora1` acts on the image's attention and `…lora2` on the text's; scale 1.
"""

import re

from lorakit.formats.content import Content
from lorakit.formats.form import Format, Known
from lorakit.formats.image import Parts, adapter_of, is_plain, weights_of
from lorakit.values.adapter import Adapter

_KEY = re.compile(r"(?:diffusion_model\.)?(.+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
_STREAM = {"1": "img_attn", "2": "txt_attn"}


def is_xlabs(content: Content) -> bool:
    """Whether a key has the form of theirs."""
    return is_plain(content) and any(_KEY.fullmatch(key) for key in content.tensors)


def read(content: Content, known: Known) -> Adapter:
    """The adapter, with the names of Flux's own layers."""
    groups: dict[str, Parts] = {}
    problems: list[str] = []
    for key, tensor in content.tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            problems.append(f"{key!r} is no part of such an adapter")
            continue
        block, which, stream, end = found.groups()
        if stream:
            path = f"{block}.{_STREAM[stream]}.{which}"
        elif which == "proj":
            path = f"{block}.linear2"
        else:
            problems.append(f"{key!r} acts on the first rows of {block}.linear1 alone, which cannot be held here")
            continue
        role = "A" if end == "down" else "B"
        if role in groups.setdefault(path, {}):
            problems.append(f"{key!r} is there under another name, too")
        groups[path][role] = tensor
    return adapter_of(content, weights_of(groups, problems), problems, format="xlabs")


XLABS = Format("xlabs", "XLabs' Flux", is_xlabs, read, takes=("part",))
