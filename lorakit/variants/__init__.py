"""What is trained: one small file per method. Nothing here names a type of layer."""

from lorakit.variants.lora import LoRA, LowRankParametrization
from lorakit.variants.variant import Variant

VARIANTS: dict[str, type[Variant]] = {variant.__name__: variant for variant in (LoRA,)}
"""Every variant, by the name that files give it."""

__all__ = ["VARIANTS", "LoRA", "LowRankParametrization", "Variant"]
