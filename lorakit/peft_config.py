"""PEFT's `adapter_config.json`: written beside every adapter, and read where there is no header of ours."""

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.header import LOOKUP_NAMES, PREFIX, Header, WeightEntry
from lorakit.layers import TransposedLinear
from lorakit.peft_checks import check_config
from lorakit.state import layers_of
from lorakit.variants import VARIANTS, Full, LoKr, Rows, Variant, VeRA

# Fields of PEFT's configs that do not change what the tensors mean: where they came from, and where they were put,
# which their keys say. Any other field that is set, and that the variant does not account for, is not understood.
_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    *("rank_pattern", "alpha_pattern", "bias", "modules_to_save", "trainable_token_indices"),
    *("init_lora_weights", "init_weights", "vera_dropout", "save_projection"),
    # AdaLoRA's schedule: it is past
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("lora_alpha", "lora_dropout", "use_rslora", "r"),
}
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal")
_PATTERNS = {"rank_pattern": ("r", "rank"), "alpha_pattern": ("lora_alpha", "alpha")}


_OURS_ALONE = "LORAKIT"
"""The peft_type of what PEFT has no words for: it then says so, where it would load a part without a word."""


def peft_config(header: Header, tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Any]:
    """What PEFT, vLLM and llama.cpp ask of `adapter_config.json`; a type unknown to them if they cannot have it all.

    Without the model it cannot be known whether other layers have names that end like those of adapted ones, which
    PEFT would take for them, nor whether weights are tied to others.
    """
    reasons = beyond_peft(header, tensors, model)
    if reasons:
        return {"peft_type": _OURS_ALONE, "reasons": reasons}
    mine = header.variant.peft_fields()
    patterns: dict[str, dict[str, Any]] = {name: {} for name in _PATTERNS}
    adapted = [entry for entry in header.weights if not isinstance(header.variant_of(entry), Full | Rows)]
    for entry in adapted:
        theirs = header.variant_of(entry).peft_fields()
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
            if theirs.get(key) != mine.get(key):
                # PEFT matches the ends of names: without ^, "conv1" would be "layer1.0.conv1" too.
                patterns[pattern]["^" + re.escape(entry.path)] = theirs[key]
    targets = [entry.path if entry.parameter == "weight" else entry.name for entry in adapted]
    config = {
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        **header.facts.get("peft", {}),
        **mine,
        "target_modules": targets,
        "inference_mode": True,
    }
    others = [] if model is None else _others_of_that_end(targets, dict(layers_of(model)))
    if others:
        # As regular expressions, which PEFT matches in full. Its VeRA cannot exclude, and few but PEFT read it.
        key, names = ("target_modules", targets) if mine["peft_type"] == "VERA" else ("exclude_modules", others)
        config[key] = "|".join(map(re.escape, names))
    if "r" in mine and mine["peft_type"] != "VERA":
        config |= patterns
    if "lora_alpha" in mine:
        rows = {entry.path: header.variant_of(entry) for entry in header.weights}
        config |= {
            "modules_to_save": header.facts.get("whole_modules") or None,
            "trainable_token_indices": {
                path: list(variant.rows) for path, variant in rows.items() if isinstance(variant, Rows)
            }
            or None,
            "bias": "none",
            "fan_in_fan_out": any(entry.kind == TransposedLinear.__name__ for entry in adapted),
            "init_lora_weights": True,
        }
    return config


def facts_of(header: Header, model: nn.Module) -> dict[str, Any]:
    """What a config says beyond the header: the base's class, its name in transformers, modules trained as a whole."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    cls = type(model)
    config = {
        "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__},
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }
    return {"peft": config, "whole_modules": _whole_modules(header, model)}


def _facts_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a config that PEFT wrote."""
    kept = ("task_type", "auto_mapping", "base_model_name_or_path", "revision")
    return {
        "peft": {key: config[key] for key in kept if config.get(key) is not None},
        "whole_modules": list(config.get("modules_to_save") or []),
    }


def beyond_peft(header: Header, tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> list[str]:
    """What of the adapter PEFT would refuse, or lose."""
    variants = {entry.name: header.variant_of(entry) for entry in header.weights}
    adapted = {entry.path for entry in header.weights if not isinstance(variants[entry.name], Full | Rows)}
    kind = header.variant.peft_fields()["peft_type"]
    reasons = [] if adapted else ["no layer has low-rank factors"]
    for entry in header.weights:
        variant = variants[entry.name]
        if isinstance(variant, Full):
            if entry.path in adapted:
                reasons.append(f"{entry.name} is trained as a whole on a layer that has factors")
        elif isinstance(variant, Rows):
            reasons += [f"rows of {entry.name} are trained beside {kind}"] * (kind != "LORA")
            if model is not None and not _tied_alike(entry, variants, model, tensors):
                reasons.append(f"rows of {entry.name} are trained apart from the weights tied to it")
        elif entry.parameter != "weight" or entry.slices:
            reasons.append(f"{entry.name} is no layer's whole weight")
        elif kind == "ADALORA" and variant != header.variant:
            reasons.append(f"{entry.name} has a rank or an alpha of its own")
    reasons += [
        f"{name} is split as PEFT has no words for: factor={variant.factor}"
        for name, variant in variants.items()
        if isinstance(variant, LoKr) and not _same_split(variant, header.variant)
    ]
    if isinstance(header.variant, VeRA):
        shapes = [entry.shape for entry in header.weights if entry.path in adapted and entry.shape is not None]
        if not shapes or header.variant != replace(header.variant, sizes=None).fit(shapes):
            reasons.append(f"the shared matrices have sizes={header.variant.sizes}, not those of the largest weights")
    return reasons


def _same_split(variant: LoKr, common: Variant) -> bool:
    """Whether PEFT splits the weight so: by one factor, the same everywhere."""
    if isinstance(variant.factor, tuple) or not isinstance(common, LoKr):
        return False
    return (variant.factor, variant.decompose_both) == (common.factor, common.decompose_both)


def _tied_alike(
    entry: WeightEntry, variants: Mapping[str, Variant], model: nn.Module, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether these rows are trained alike in all layers whose weights are tied: they are the same rows to PEFT."""
    weight = model.get_submodule(entry.path)._parameters.get(entry.parameter)
    tied = [(name, own) for name, m in layers_of(model) for own, p in m._parameters.items() if p is weight]
    values: dict[Variant | None, list[Tensor]] = {}
    for layer, own in tied:
        key = f"{PREFIX}{layer}.{Rows.file_names['value']}"
        values.setdefault(variants.get(f"{layer}.{own}"), []).append(tensors.get(key, torch.empty(0)))
    return None not in values and all(torch.equal(each[0], v) for each in values.values() for v in each)


def _others_of_that_end(targets: Collection[str], layers: Collection[str]) -> list[str]:
    """Modules that are no targets, which PEFT would take for some: it compares the ends of names."""
    wanted, found = set(targets), []
    for name in layers:
        ends = (name.split(".", i)[-1] for i in range(1, name.count(".") + 1))
        if name not in wanted and any(end in wanted for end in ends):
            found.append(name)
    return found


def _whole_modules(header: Header, model: nn.Module) -> list[str]:
    """The modules that are trained as a whole, with all that they hold.

    Without those whose name is the end of another's: PEFT would take that for one of them. Of a module that is not
    listed it loads the values into the base, which computes the same.
    """
    full = {entry.name: entry.path for entry in header.weights if isinstance(header.variant_of(entry), Full)}
    whole = [
        path
        for path in dict.fromkeys(full.values())
        if all(
            ".".join(filter(None, (path, below, name))) in full
            for below, module in layers_of(model.get_submodule(path))
            for name, parameter in module._parameters.items()
            if parameter is not None
        )
    ]
    others = {name for name, _ in layers_of(model)} - set(whole)
    return [path for path in whole if not any(other.endswith(path) for other in others)]


def peft_disagreements(header: Header, config: Mapping[str, Any]) -> list[str]:
    """Which fields of a config contradict the header it lies beside."""
    if config.get("peft_type") == _OURS_ALONE:
        return []
    known = {"bias": "none", **header.variant.peft_fields()}
    return [key for key, value in known.items() if config.get(key, value) != value] + [
        key for key, value in config.items() if value and key not in _UNDERSTOOD and key not in known
    ]


def header_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Header:
    """The header of a directory that PEFT wrote.

    Raises:
        LorakitError: it is a method that is not known, or has parts that are not read; each is named.
    """
    if config.get("peft_type") == _OURS_ALONE:
        raise LorakitError(f"{path}: its tensors have lost the header that lorakit wrote into them; save it again")
    check_config(config, path)
    if config.get("peft_type") is None:
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
    if unread:
        raise LorakitError(f"{path} has what cannot be read yet: {', '.join(unread)}")
    names = {*variant.file_names.values()} | {LOOKUP_NAMES.get(name, name) for name in variant.file_names.values()}
    endings = [(key, "." + name) for name in names for key in tensors if key.endswith("." + name)]
    paths = sorted({key.removeprefix(PREFIX).removesuffix(ending) for key, ending in endings})
    entries = [_entry(layer, "weight", _own(variant, config, layer, path)) for layer in paths]
    entries += _extra_entries(config, set(tensors) - {key for key, _ in endings} - {*variant.shared_names}, path)
    return Header(path.absolute().name, variant, tuple(entries), ours=False, facts=_facts_in(config))


def _entry(layer: str, parameter: str, variant: Variant | None) -> WeightEntry:
    return WeightEntry(layer, parameter, None, None, None, None, variant)


def _extra_entries(config: Mapping[str, Any], keys: Collection[str], path: Path) -> list[WeightEntry]:
    """Whole modules, biases and rows of tokens, which PEFT saves beside the factors."""
    whole = bool(config.get("modules_to_save")) or config.get("bias", "none") != "none"
    indices = config.get("trainable_token_indices") or {}
    entries = []
    for key in sorted(keys):
        name, ending = key.removeprefix(PREFIX), "." + Rows.file_names["value"]
        if name.endswith(ending):
            layer = name.removesuffix(ending)
            rows = indices if isinstance(indices, list) else _matching(indices, layer)
            if rows is None:
                raise LorakitError(f"{path}: trainable_token_indices does not say which rows {key!r} holds")
            entries.append(_entry(layer, "weight", Rows(tuple(rows))))
        elif whole:
            entries.append(_entry(*name.rpartition(".")[::2], Full()))
    return entries


def _matching(patterns: Mapping[str, Any], layer: str) -> Any:
    """The value of the first pattern that matches the layer's end, as PEFT matches; None if none does."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, None)


def _own(variant: Variant, config: Mapping[str, Any], layer: str, path: Path) -> Variant | None:
    """The variant of one layer, where PEFT's patterns give it another rank or alpha."""
    own = {}
    for field, (_, name) in _PATTERNS.items():
        value = _matching(config.get(field) or {}, layer)
        if value is not None:
            own[name] = value
    known = {field.name for field in fields(variant)}
    if not own.keys() <= known:
        raise LorakitError(f"{path}: rank_pattern and alpha_pattern have no meaning for {type(variant).__name__}")
    return replace(variant, **own) if own else None
