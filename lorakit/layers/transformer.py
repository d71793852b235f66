"""torch's own transformer layers: their attentions and feed-forward layers make them whole.

`nn.TransformerEncoderLayer` has a fused path for inference that reads the weights of `linear1` and `linear2` and calls
neither; `nn.TransformerEncoder` decides by whether they require gradients if it may hand over nested tensors, which
the unfused path does not take. In the weight, an update is seen by both. The decoder calls its two.
"""

from torch import nn

from lorakit.layers.kind import Parts, register_parts

_FEED_FORWARD = ("linear1", "linear2")


@register_parts
def _(layer: nn.TransformerEncoderLayer) -> Parts:
    return Parts(named=("self_attn", *_FEED_FORWARD), read=_FEED_FORWARD)


@register_parts
def _(layer: nn.TransformerDecoderLayer) -> Parts:
    return Parts(named=("self_attn", "multihead_attn", *_FEED_FORWARD))
