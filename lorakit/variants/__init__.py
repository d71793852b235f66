"""What is trained: one small file per method. Nothing here names a type of layer."""

from lorakit.variants.adalora import AdaLoRA, TripletUpdate
from lorakit.variants.dora import DoRA
from lorakit.variants.full import Full, FullUpdate, Rows
from lorakit.variants.loha import LoHa
from lorakit.variants.lokr import LoKr
from lorakit.variants.lora import LoRA, LowRankParametrization, SubtractedUpdate
from lorakit.variants.lora_fa import LoRAFA
from lorakit.variants.low_rank import LowRank
from lorakit.variants.updates import DenseUpdate, FactoredUpdate
from lorakit.variants.variant import VARIANTS, Evidence, Variant
from lorakit.variants.vera import VeRA

__all__ = [
    "VARIANTS",
    "AdaLoRA",
    "DenseUpdate",
    "DoRA",
    "Evidence",
    "FactoredUpdate",
    "Full",
    "FullUpdate",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LowRank",
    "LowRankParametrization",
    "Rows",
    "SubtractedUpdate",
    "TripletUpdate",
    "Variant",
    "VeRA",
]
