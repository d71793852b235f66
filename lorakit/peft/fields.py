"""PEFT's config as a header: what its fields mean, and which of them are not understood."""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.header import LOOKUP_NAMES, PREFIX, Header, WeightEntry
from lorakit.peft.checks import check_config
from lorakit.storage import name_of
from lorakit.untrusted import Patterns
from lorakit.variants import VARIANTS, Full, Rows, Variant

# Fields of PEFT's configs that do not change what the tensors mean: where they came from, and where they were put,
# which their keys say. Any other field that is set, and that the variant does not account for, is not understood.
UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    *("rank_pattern", "alpha_pattern", "bias", "modules_to_save", "trainable_token_indices"),
    *("init_lora_weights", "init_weights", "vera_dropout", "save_projection"),
    # AdaLoRA's schedule: it is past
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("lora_alpha", "lora_dropout", "use_rslora", "r"),
    *("target_parameters", "lora_bias"),  # what their tensors mean is told by their keys, and by a live model
    *("corda_config", "loftq_config", "lora_ga_config"),  # of starts that init_lora_weights names, or has outlived
    "merge_weights",  # of PEFT 0.2: whether eval() was to merge
}
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
"""Layers that PEFT saves along as a whole where a vocabulary was enlarged, whatever its config says."""
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal")
PATTERNS = {"rank_pattern": ("r", "rank"), "alpha_pattern": ("lora_alpha", "alpha")}


_READ = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA")
"""The methods that are read, as PEFT calls them."""
OURS_ALONE = "LORAKIT"
"""The peft_type of what PEFT has no words for: it then says so, where it would load a part without a word."""


def header_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, known_as: Mapping[str, str] | None = None
) -> Header:
    """The header of a directory that PEFT wrote. `known_as` says by which names patterns know layers, if others.

    Raises:
        LorakitError: it is a method that is not known, or has parts that are not read; each is named.
    """
    if config.get("peft_type") == OURS_ALONE:
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
        raise LorakitError(f"{path}: peft_type is {config['peft_type']!r}; what can be read is {', '.join(_READ)}")
    (variant,) = found
    unread = [
        f"{key}={value!r}"
        for key, value in config.items()
        if value and key not in UNDERSTOOD and key not in variant.peft_fields()
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _KEEPS_THE_BASE:
        unread.append(f"init_lora_weights={start!r}, which changes the base")
    if unread:
        raise LorakitError(f"{path} has what cannot be read yet: {', '.join(unread)}")
    names = {*variant.file_names.values()} | {LOOKUP_NAMES.get(name, name) for name in variant.file_names.values()}
    endings = [(key, "." + name) for name in names for key in tensors if key.endswith("." + name)]
    paths = sorted({key.removeprefix(PREFIX).removesuffix(ending) for key, ending in endings})
    known_as = known_as or {}
    entries = [
        _entry(layer, "weight", own_variant(variant, config, known_as.get(layer, layer), path)) for layer in paths
    ]
    if config.get("fan_in_fan_out"):  # their layers are transformers' `Conv1D`; look-ups and kernels have no such thing
        flat = {key.removeprefix(PREFIX).removesuffix(end) for key, end in endings if tensors[key].dim() == 2}
        flat -= {key.removeprefix(PREFIX).removesuffix(end) for key, end in endings if "embedding" in end}
        entries = [each._replace(kind="TransposedLinear") if each.path in flat else each for each in entries]
    entries += _extra_entries(config, set(tensors) - {key for key, _ in endings} - {*variant.shared_names}, path)
    return Header(name_of(path), variant, tuple(entries), ours=False, facts=_facts_in(config))


def peft_facts(header: Header) -> Mapping[str, Any]:
    """What a header knows of PEFT's config; whoever wrote the file may have written anything there."""
    facts = header.facts.get("peft")
    return facts if isinstance(facts, Mapping) else {}


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
            rows = indices if isinstance(indices, list) else _matching(indices, layer, path)
            if rows is None:
                raise LorakitError(f"{path}: trainable_token_indices does not say which rows {key!r} holds")
            entries.append(_entry(layer, "weight", Rows(tuple(rows))))
        elif whole or (name.endswith(".weight") and name.split(".")[-2:-1][0] in _EMBEDDINGS):
            entries.append(_entry(*name.rpartition(".")[::2], Full()))
    return entries


def _matching(patterns: Mapping[str, Any], layer: str, path: Path) -> Any:
    """The value of the first pattern that matches the layer's end, as PEFT matches; None if none does."""
    found = Patterns(patterns, str(path)).first(layer)
    return None if found is None else patterns[found]


def own_variant(variant: Variant, config: Mapping[str, Any], layer: str, path: Path) -> Variant | None:
    """The variant of one layer, where PEFT's patterns give it another rank or alpha."""
    own = {}
    for field, (_, name) in PATTERNS.items():
        value = _matching(config.get(field) or {}, layer, path)
        if value is not None:
            own[name] = value
    known = {field.name for field in fields(variant)}
    if not own.keys() <= known:
        raise LorakitError(f"{path}: rank_pattern and alpha_pattern have no meaning for {type(variant).__name__}")
    try:
        return replace(variant, **own) if own else None
    except LorakitError as error:
        raise LorakitError(f"{path}: in its patterns for {layer!r}, {error}") from None


def _facts_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a config that PEFT wrote."""
    kept = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "bias", "fan_in_fan_out")
    return {
        "peft": {key: config[key] for key in kept if config.get(key) not in (None, False, "none")},
        "whole_modules": list(config.get("modules_to_save") or []),
    }
