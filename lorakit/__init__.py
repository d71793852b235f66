"""LoRA for any PyTorch model: attach, train, save, switch and merge low-rank updates.

import lorakit as lk

report = lk.attach(model, lk.LoRA(rank=8), targets="all-linear", name="sql")
train(model)
lk.save(model, "adapters/sql", name="sql")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.algebra import decompose, numerical_rank
from lorakit.attach import attach, detach, plan, remove
from lorakit.budget import RankBudget
from lorakit.combine import combine
from lorakit.errors import LorakitError
from lorakit.files import adapter_state_dict, adapter_value, load, save
from lorakit.flat import flat_parameter
from lorakit.merge import merge, merged
from lorakit.probe import probe
from lorakit.resident import adapter_parameter_groups, adapter_parameters, adapters, set_trainable
from lorakit.switch import activate, active, disabled, per_row
from lorakit.values.adapter import Adapter, weighted_sum
from lorakit.variants import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, LoRAFA, LowRankParametrization, Rows, VeRA

if TYPE_CHECKING:
    from lorakit.checkpoints.extracting import extract
    from lorakit.checkpoints.merging import merge_checkpoint
    from lorakit.exchange import read, renamed_for, write
    from lorakit.values.arithmetic import dare, resize, ties
    from lorakit.values.comparison import compare
    from lorakit.values.inspection import inspect
    from lorakit.values.measures import amplification, intruders, norm, overlap, spectrum

__version__ = "0.1.0"

_LATE = {
    "amplification": "lorakit.values.measures",
    "compare": "lorakit.values.comparison",
    "dare": "lorakit.values.arithmetic",
    "extract": "lorakit.checkpoints.extracting",
    "inspect": "lorakit.values.inspection",
    "intruders": "lorakit.values.measures",
    "merge_checkpoint": "lorakit.checkpoints.merging",
    "norm": "lorakit.values.measures",
    "overlap": "lorakit.values.measures",
    "read": "lorakit.exchange",
    "renamed_for": "lorakit.exchange",
    "resize": "lorakit.values.arithmetic",
    "spectrum": "lorakit.values.measures",
    "ties": "lorakit.values.arithmetic",
    "write": "lorakit.exchange",
}
"""What works on files and values, and is imported when it is first used: a program that trains has no need of it."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LATE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


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
    "extract",
    "flat_parameter",
    "inspect",
    "intruders",
    "load",
    "merge",
    "merge_checkpoint",
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
