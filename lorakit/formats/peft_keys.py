"""Keys of PEFT's files that are not a layer's name and what it has: of parameters, attention, biases, the base itself.

Some of it has a meaning in the live model alone: which parameters of a module PEFT wrapped and in which order they are
declared, what a bias is that something is added to. The value keeps it as it is in the file until `resolved`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.header import PREFIX, Header, WeightEntry, file_key
from lorakit.patterns import some
from lorakit.peft.checks import check_config
from lorakit.peft.fields import header_from_peft, own_variant
from lorakit.peft.layout import A_KEY, B_KEY, WRAPPED
from lorakit.variants import AdaLoRA, Full, Rows

PARAMETER, ADDEND, BASE = "peft: parameter", "peft: addend", "peft: base"
NAMING = "peft-parameters"
_ATTENTION = re.compile(r"^(.+)\.base_layer\.out_proj\.lora_[AB]\.weight$")
_MOST = 2**24
"""No layer has more ranks."""


class Theirs(NamedTuple):
    """What PEFT's file holds."""

    header: Header
    tensors: dict[str, Tensor]
    """By the keys that the header's entries have."""
    unresolved: bool
    """Whether the live model must say what some of it means."""


def understood(config: Mapping[str, Any], content: Mapping[str, Tensor], path: Path) -> Theirs:
    """The header and the tensors of a directory that PEFT wrote.

    Raises:
        LorakitError: it is a method that is not known, or has parts that are not read or do not fit; each is named.
    """
    tensors = {key.replace(f"{WRAPPED}.bias", ".bias"): tensor for key, tensor in content.items()}
    if len(tensors) != len(content):
        raise LorakitError(f"{path} holds a bias twice, beside the layer and in its base_layer")
    config = dict(config)
    if config.get("peft_type") == "ADALORA" and config.get("rank_pattern"):
        _fill_pruned(config, tensors, path)
    names = _attention(tensors)
    parameters = _parameters(config, tensors, path)
    addends = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".lora_B.bias")}
    bases = {key: tensors.pop(key) for key in list(tensors) if key.endswith(f"{WRAPPED}.weight")}
    header = header_from_peft(config, tensors, path, names)
    _check_whole_modules(config, header, path)
    _check_targets(config, header, names, parameters, path)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in header.variant.shared_names}
    entries = [_reread(entry, names, parameters) for entry in header.weights]
    for key, tensor in addends.items():
        layer = key.removeprefix(PREFIX).removesuffix(".lora_B.bias")
        scale = getattr(own_variant(header.variant, config, layer, path) or header.variant, "scale", None)
        if scale is None or not tensor.dtype.is_floating_point:
            raise LorakitError(f"{path}: {key!r} is a bias of what has no scale, or of no floats: {tensor.dtype}")
        entry, value = _whole(layer, "bias", ADDEND), tensor.float() * scale
        entries.append(entry)
        _put(tensors, entry, value, path)
    for key, tensor in bases.items():
        entry = _whole(key.removeprefix(PREFIX).removesuffix(f"{WRAPPED}.weight"), "weight", BASE)
        entries.append(entry)
        _put(tensors, entry, tensor, path)
    unresolved = bool(parameters or addends or bases)
    facts = {**header.facts, "unresolved": config} if unresolved else header.facts
    return Theirs(replace(header, weights=tuple(entries), facts=facts), tensors, unresolved)


def _whole(path: str, parameter: str, kind: str) -> WeightEntry:
    return WeightEntry(path, parameter, None, None, None, None, Full(), (), kind)


def _put(tensors: dict[str, Tensor], entry: WeightEntry, value: Tensor, path: Path) -> None:
    key = file_key(entry.path, entry.parameter, "", False)
    if key in tensors:
        raise LorakitError(f"{path} holds {entry.name!r} in two ways, as a whole and for the layer that PEFT wraps")
    tensors[key] = value


def _reread(entry: WeightEntry, names: Mapping[str, str], parameters: set[str]) -> WeightEntry:
    """An entry of a layer's weight, as what its key turned out to mean."""
    if entry.path in parameters:
        return entry._replace(kind=PARAMETER)
    if entry.path in names and entry.path.endswith(".in_proj_weight"):
        path, _, parameter = entry.path.rpartition(".")
        return entry._replace(path=path, parameter=parameter)
    return entry


def _attention(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Give the parts of `nn.MultiheadAttention` their names; returns the names that patterns know them by."""
    names: dict[str, str] = {}
    for key in list(tensors):
        found = _ATTENTION.match(key)
        if found is None:
            continue
        stem = found[1]
        tensors[key.replace(f"{WRAPPED}.out_proj.", ".out_proj.")] = tensors.pop(key)
        name = stem.removeprefix(PREFIX)
        names |= {f"{name}.out_proj": name, f"{name}.in_proj_weight": name}
        for end in (A_KEY, B_KEY):
            if f"{stem}.{end}" in tensors:
                tensors[f"{stem}.in_proj_weight.{end}"] = tensors.pop(f"{stem}.{end}")
    return names


def _parameters(config: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> set[str]:
    """The modules whose parameters PEFT may have wrapped, as the keys have them.

    A layer that lies in one, and is adapted by itself, gets its own name back.
    """
    targets = config.get("target_parameters") or []
    check_config({"target_parameters": targets}, path)
    owners = [target.rpartition(".")[0] for target in targets]
    found = set()
    for key in list(tensors):
        stem, dot, end = key.partition(".lora_")
        name = stem.removeprefix(PREFIX)
        bare = name.replace(WRAPPED, "")
        if any(not owner or bare == owner or bare.endswith(f".{owner}") for owner in owners):
            found.add(name)
        elif targets and dot and bare != name:
            tensors[f"{PREFIX}{bare}{dot}{end}"] = tensors.pop(key)
    return found


def _fill_pruned(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Put ranks that AdaLoRA's budget took out of the file back, as zeros: the same product, and the same scale."""
    masks = config.pop("rank_pattern")
    rank = AdaLoRA(config["init_r"]).rank if "init_r" in config else 0
    for name, mask in masks.items() if isinstance(masks, Mapping) else [("rank_pattern", masks)]:
        flat = mask if isinstance(mask, list) else []
        if len(flat) != rank or rank > _MOST or not all(type(kept) is bool for kept in flat):
            raise LorakitError(
                f"{path}: in its config, rank_pattern of {name!r} does not say of each rank whether it is kept"
            )
        stem = PREFIX + re.sub(r"\.lora_E(\..*)?$", "", str(name))
        kept = torch.tensor(flat)
        for end, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            value = tensors.get(f"{stem}.{end}")
            if value is None:
                raise LorakitError(f"{path}: rank_pattern is about {name!r}, of which the file holds no {end}")
            if value.dim() != 2 or value.shape[axis] not in (rank, int(kept.sum())):
                raise LorakitError(
                    f"{path}: {name!r}: {end} of shape {tuple(value.shape)} has neither {rank} ranks nor the "
                    f"{int(kept.sum())} that were kept"
                )
            if value.shape[axis] != rank:
                shape = [rank if i == axis else size for i, size in enumerate(value.shape)]
                tensors[f"{stem}.{end}"] = value.new_zeros(shape).index_copy(axis, kept.nonzero().flatten(), value)


def _check_whole_modules(config: Mapping[str, Any], header: Header, path: Path) -> None:
    """Whether the modules that were trained as a whole are there."""
    named = config.get("modules_to_save") or []
    whole = [entry.path for entry in header.weights if isinstance(header.variant_of(entry), Full)]
    gone = [name for name in named if not any(f".{name}." in f".{path}." for path in whole)]
    if len(gone) == len(named) and gone:
        raise LorakitError(
            f"{path}: modules_to_save names {', '.join(map(repr, gone))}, of which the file holds nothing"
        )


def _check_targets(
    config: Mapping[str, Any], header: Header, names: Mapping[str, str], parameters: set[str], path: Path
) -> None:
    """Whether the config is of these tensors: PEFT makes factors for the layers it targets, and skips all others.

    Of targets as a regular expression that is not asked: names are at times mapped when files are written.
    """
    targets = config.get("target_modules")
    if not targets or isinstance(targets, str) or config.get("ensure_weight_tying"):
        return
    beyond = []
    for entry in header.weights:
        name = names.get(entry.path, entry.path)
        ends = {name.split(".", i)[-1] for i in range(name.count(".") + 1)}
        if (
            not isinstance(header.variant_of(entry), Full | Rows)
            and entry.path not in parameters
            and ends.isdisjoint(targets)
        ):
            beyond.append(entry.path)
    if beyond:
        raise LorakitError(
            f"{path}: its config targets {some(list(targets))}, and the tensors are also of {some(beyond)}: it is the "
            "config of another adapter, whose alpha may be another. Put the right one there, or add these to "
            "target_modules"
        )
