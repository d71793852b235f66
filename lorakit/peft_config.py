"""PEFT's `adapter_config.json`: written beside every adapter, and read where there is no header of ours."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.header import LOOKUP_NAMES, PREFIX, Header, WeightEntry
from lorakit.layers import TransposedLinear, kind_of
from lorakit.variants import VARIANTS, Variant

# Fields of PEFT's configs that do not change what the tensors mean: where they came from, and where they were put,
# which their keys say. Any other field that is set, and that the variant does not account for, is not understood.
_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    *("rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "init_weights", "vera_dropout", "save_projection"),
    # AdaLoRA's schedule: it is past
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("lora_alpha", "lora_dropout", "use_rslora", "r"),
}
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal")
_PATTERNS = {"rank_pattern": ("r", "rank"), "alpha_pattern": ("lora_alpha", "alpha")}


def peft_config(header: Header, model: nn.Module) -> dict[str, Any]:
    """What PEFT, vLLM and llama.cpp ask of `adapter_config.json`."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    mine = header.variant.peft_fields()
    patterns: dict[str, dict[str, Any]] = {name: {} for name in _PATTERNS}
    for entry in header.weights:
        theirs = header.variant_of(entry).peft_fields()
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
            if theirs.get(key) != mine.get(key):
                patterns[pattern][re.escape(entry.path)] = theirs[key]
    config = {
        "task_type": None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "revision": None,
        **mine,
        "target_modules": [entry.path if entry.parameter == "weight" else entry.name for entry in header.weights],
        "inference_mode": True,
    }
    if "r" in mine and mine["peft_type"] != "VERA":
        config |= patterns
    if "lora_alpha" in mine:
        config |= {
            "modules_to_save": None,
            "bias": "none",
            "fan_in_fan_out": any(
                isinstance(kind_of(model.get_submodule(entry.path)), TransposedLinear) for entry in header.weights
            ),
            "init_lora_weights": True,
        }
    return config


def peft_disagreements(header: Header, config: Mapping[str, Any]) -> list[str]:
    """Which fields of a config contradict the header it lies beside."""
    known = {"bias": "none", **header.variant.peft_fields()}
    return [key for key, value in known.items() if config.get(key, value) != value] + [
        key for key, value in config.items() if value and key not in _UNDERSTOOD and key not in known
    ]


def header_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Header:
    """The header of a directory that PEFT wrote.

    Raises:
        LorakitError: it is a method that is not known, or has parts that are not read; each is named.
    """
    if "peft_type" not in config:
        raise LorakitError(f"{path}: its config has no 'peft_type', so what the tensors mean is not known")
    try:
        found = [variant for cls in VARIANTS.values() if (variant := cls.of_peft(config, tensors)) is not None]
    except KeyError as error:
        raise LorakitError(f"{path}: its config has no {error}, and a scale is never guessed") from None
    except LorakitError as error:
        raise LorakitError(f"{path}: in its config, {error}") from None
    if not found:
        raise LorakitError(f"{path}: peft_type is {config['peft_type']!r}; what can be read is {', '.join(VARIANTS)}")
    (variant,) = found
    unread = [
        f"{key}={value!r}"
        for key, value in config.items()
        if value and key not in _UNDERSTOOD and key not in variant.peft_fields()
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _KEEPS_THE_BASE:
        unread.append(f"init_lora_weights={start!r}, which changes the base")
    if config.get("bias", "none") != "none":
        unread.append(f"bias={config['bias']!r}")
    if unread:
        raise LorakitError(f"{path} has what cannot be read yet: {', '.join(unread)}")
    names = {*variant.file_names.values()} | {LOOKUP_NAMES.get(name, name) for name in variant.file_names.values()}
    paths = sorted(
        {
            key.removeprefix(PREFIX).removesuffix("." + name)
            for name in names
            for key in tensors
            if key.endswith("." + name)
        }
    )
    entries = (
        WeightEntry(layer, "weight", None, None, None, None, _own(variant, config, layer, path)) for layer in paths
    )
    return Header(path.name, variant, tuple(entries), ours=False)


def _own(variant: Variant, config: Mapping[str, Any], layer: str, path: Path) -> dict[str, Any]:
    """The rank and the alpha of one layer, where PEFT's patterns give it others: the first that matches its end."""
    own = {}
    for field, (_, name) in _PATTERNS.items():
        for pattern, value in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                own[name] = value
                break
    known = {field.name for field in fields(variant)}
    if not own.keys() <= known:
        raise LorakitError(f"{path}: rank_pattern and alpha_pattern have no meaning for {type(variant).__name__}")
    return own
