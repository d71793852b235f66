"""PEFT's `adapter_config.json`: written beside every adapter, and read where there is no header of ours."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.header import PREFIX, Header, WeightEntry
from lorakit.layers import Parameter, TransposedLinear, parts_of
from lorakit.patterns import some
from lorakit.peft.fields import OURS_ALONE, PATTERNS, UNDERSTOOD, peft_facts
from lorakit.peft.layout import Placed, inner_biases, placed
from lorakit.state import layers_of
from lorakit.variants import Full, LoKr, Rows, Variant, VeRA


def peft_config(header: Header, tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Any]:
    """What PEFT, vLLM and llama.cpp ask of `adapter_config.json`; a type unknown to them if they cannot have it all.

    Without the model it cannot be known whether other layers have names that end like those of adapted ones, which
    PEFT would take for them, nor whether weights are tied to others.
    """
    reasons = beyond_peft(header, tensors, model)
    if reasons:
        return {"peft_type": OURS_ALONE, "reasons": reasons}
    mine = header.variant.peft_fields()
    patterns: dict[str, dict[str, Any]] = {name: {} for name in PATTERNS}
    adapted = [entry for entry in header.weights if not isinstance(header.variant_of(entry), Full | Rows)]
    places = placed(header)
    for entry in adapted:
        theirs = header.variant_of(entry).peft_fields()
        name = entry.name if entry.name in places else entry.path
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
            if theirs.get(key) != mine.get(key):
                # PEFT matches the ends of names: without ^, "conv1" would be "layer1.0.conv1" too.
                patterns[pattern]["^" + re.escape(name)] = theirs[key]
    targets = [entry.path for entry in adapted if entry.name not in places]
    config = {
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        **peft_facts(header),
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
        facts = peft_facts(header)
        bias = facts.get("bias") or ("lora_only" if inner_biases(header) else "none")
        config |= {"target_parameters": list(places)} if places else {}
        config |= {
            "modules_to_save": header.facts.get("whole_modules") or None,
            "trainable_token_indices": {
                path: list(variant.rows) for path, variant in rows.items() if isinstance(variant, Rows)
            }
            or None,
            "bias": bias,
            "fan_in_fan_out": any(entry.kind == TransposedLinear.__name__ for entry in adapted)
            or bool(facts.get("fan_in_fan_out")),
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


def beyond_peft(header: Header, tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> list[str]:
    """What of the adapter PEFT would refuse, or lose."""
    variants = {entry.name: header.variant_of(entry) for entry in header.weights}
    adapted = {entry.path for entry in header.weights if not isinstance(variants[entry.name], Full | Rows)}
    kind = header.variant.peft_fields()["peft_type"]
    reasons = [] if adapted else ["no layer has low-rank factors"]
    places, biases = placed(header), inner_biases(header)
    for entry in header.weights:
        variant = variants[entry.name]
        if isinstance(variant, Full):
            if entry.path in adapted and f"{PREFIX}{entry.name}" not in biases:
                reasons.append(f"{entry.name} is trained as a whole on a layer that has factors")
        elif isinstance(variant, Rows):
            reasons += [f"rows of {entry.name} are trained beside {kind}"] * (kind != "LORA")
            if model is not None and not _tied_alike(entry, variants, model, tensors):
                reasons.append(f"rows of {entry.name} are trained apart from the weights tied to it")
        else:
            reasons += _beyond_factors(entry, header, places, model)
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


_UNKNOWN_TO_PEFT = ("TransposedConvolution", "Bilinear", "EmbeddingBag")
"""Kinds of layers, by the names of their classes, that PEFT adapts with no method."""


def _beyond_factors(
    entry: WeightEntry, header: Header, places: Mapping[str, Placed], model: nn.Module | None
) -> list[str]:
    """Why PEFT could not have the factors of a weight."""
    if entry.name in places:
        return _beyond_parameters(entry, header, places, model)
    if entry.parameter != "weight" or entry.slices or entry.kind == Parameter.__name__:
        return [f"{entry.name} is no layer's whole weight"]
    if entry.kind in _UNKNOWN_TO_PEFT:
        return [f"{entry.name} is of a kind that PEFT does not adapt ({entry.kind})"]
    layer: Any = None if model is None else model.get_submodule(entry.path)
    if entry.groups != 1:
        return [f"{entry.name} is a convolution of {entry.groups} groups, where PEFT has a kernel across groups"]
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return [f"{entry.name} is padded by {layer.padding_mode!r}, and by zeros in PEFT's product"]
    if getattr(layer, "padding", None) == "same" and any(size != 1 for size in layer.dilation):
        return [f"{entry.name} is padded to the same size with a dilation, which PEFT's product leaves out"]
    if getattr(layer, "max_norm", None) is not None:
        return [f"{entry.name} has max_norm, which rescales its rows with the update here and without it in PEFT"]
    parent, _, own = entry.path.rpartition(".")
    if model is not None and entry.path and own in parts_of(model.get_submodule(parent)).read:
        return [f"{entry.name} is read by {type(model.get_submodule(parent)).__name__}, past the layer that PEFT wraps"]
    if header.variant.peft_fields()["peft_type"] == "ADALORA" and header.variant_of(entry) != header.variant:
        return [f"{entry.name} has a rank or an alpha of its own"]
    return []


def _beyond_parameters(
    entry: WeightEntry, header: Header, places: Mapping[str, Placed], model: nn.Module | None
) -> list[str]:
    """Why PEFT could not have the factors of a parameter."""
    reasons, variant = [], header.variant_of(entry)
    if getattr(variant, "dropout", 0):
        reasons.append(f"{entry.name} has dropout={variant.peft_fields()['lora_dropout']}, which acts on no parameter")
    if places[entry.name].transposed and places[entry.name].experts == 1:
        reasons.append(f"{entry.name} is a stack of one transposed matrix, which PEFT turns round")
    if any(other.kind == TransposedLinear.__name__ for other in header.weights):
        reasons.append(f"{entry.name} is adapted beside a Conv1D of transformers, which PEFT cannot have together")
    below = [other.name for other in header.weights if other.path.startswith(f"{entry.path}.")]
    if below:
        reasons.append(f"{some(below)} lie in {entry.path}, which PEFT wraps for {entry.name}")
    ends = [] if model is None else _others_of_that_end([entry.name], [name for name, _ in model.named_parameters()])
    if ends:
        reasons.append(f"PEFT would take {some(ends)} for {entry.name}")
    return reasons


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
    if config.get("peft_type") == OURS_ALONE:
        return []
    bias = peft_facts(header).get("bias") or ("lora_only" if inner_biases(header) else "none")
    known = {"bias": bias, **header.variant.peft_fields()}
    return [key for key, value in known.items() if config.get(key, value) != value] + [
        key for key, value in config.items() if value and key not in UNDERSTOOD and key not in known
    ]
