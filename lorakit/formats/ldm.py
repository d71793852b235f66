"""The UNet of Stable Diffusion XL has two sets of names: those of its authors, which sd-scripts writes, and diffusers'.

Both are flattened here, every dot an underscore. `input_blocks_4_1_…` counts all blocks before the middle one after the
other; diffusers counts levels, and in each resnets and attentions apart.
"""

import re
from collections.abc import Container

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_MIDDLE = {"0": "mid_block_resnets_0", "1": "mid_block_attentions_0", "2": "mid_block_resnets_1"}
_LAYERS = 3
"""Blocks of a level: two and a downsampler on the way down, three on the way up."""


def as_diffusers(name: str, known: Container[str]) -> str | None:
    """The flattened name in diffusers' UNet, of those that are known; None if none is it."""
    return next((each for each in _candidates(name) if each in known), None)


def _candidates(name: str) -> list[str]:
    if name in _SINGLE:
        return [_SINGLE[name]]
    middle = re.fullmatch(r"middle_block_([0-2])_(.+)", name)
    if middle is not None:
        return [f"{_MIDDLE[middle[1]]}_{_inside(middle[2])}"]
    block = re.fullmatch(r"(in|out)put_blocks_(\d{1,3})_([0-2])_(.+)", name)
    if block is None:
        return []
    way, number, part, rest = block[1], int(block[2]), block[3], block[4]
    if way == "in":
        level, layer = divmod(number - 1, _LAYERS)
        if rest == "op":
            return [f"down_blocks_{level}_downsamplers_0_conv"]
        where = f"down_blocks_{level}"
    else:
        level, layer = divmod(number, _LAYERS)
        if rest == "conv":
            return [f"up_blocks_{level}_upsamplers_0_conv"]
        where = f"up_blocks_{level}"
    kind = "resnets" if part == "0" else "attentions"
    return [f"{where}_{kind}_{layer}_{_inside(rest)}"]


def _inside(rest: str) -> str:
    return _RESNET.get(rest, rest)
