"""LoRA for any PyTorch model: attach, train, save, switch and merge low-rank updates.

import lorakit as lk

report = lk.attach(model, lk.LoRA(rank=8), targets="all-linear", name="sql")
train(model)
lk.save(model, "adapters/sql", name="sql")
"""

from lorakit.algebra import decompose, numerical_rank
from lorakit.attach import attach, detach, plan, remove
from lorakit.budget import RankBudget
from lorakit.combine import combine
from lorakit.errors import LorakitError
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_state_dict, adapter_value, load, save
from lorakit.flat import flat_parameter
from lorakit.merge import merge, merged
from lorakit.probe import probe
from lorakit.resident import adapter_parameter_groups, adapter_parameters, adapters, set_trainable
from lorakit.switch import activate, active, disabled, per_row
from lorakit.values.adapter import Adapter, weighted_sum
from lorakit.values.arithmetic import dare, resize, ties
from lorakit.values.comparison import compare
from lorakit.values.inspection import inspect
from lorakit.values.measures import amplification, intruders, norm, overlap, spectrum
from lorakit.variants import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, LoRAFA, LowRankParametrization, Rows, VeRA

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "Adapter",
    "DoRA",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LorakitError",
    "LowRankParametrization",
    "RankBudget",
    "Rows",
    "VeRA",
    "activate",
    "active",
    "adapter_parameter_groups",
    "adapter_parameters",
    "adapter_state_dict",
    "adapter_value",
    "adapters",
    "amplification",
    "attach",
    "combine",
    "compare",
    "dare",
    "decompose",
    "detach",
    "disabled",
    "flat_parameter",
    "inspect",
    "intruders",
    "load",
    "merge",
    "merged",
    "norm",
    "numerical_rank",
    "overlap",
    "per_row",
    "plan",
    "probe",
    "read",
    "remove",
    "renamed_for",
    "resize",
    "save",
    "set_trainable",
    "spectrum",
    "ties",
    "weighted_sum",
    "write",
]
