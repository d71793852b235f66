"""What a file says about the adapter in it: our own header, and PEFT's `adapter_config.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.errors import LorakitError
from lorakit.fingerprint import fingerprint
from lorakit.layers import Mode, TransposedLinear, base_weight, kinds_of
from lorakit.state import Site
from lorakit.storage import parse_json_object
from lorakit.variants import VARIANTS, LoRA, Variant

_VERSION = 1
_PREFIX = "base_model.model."
_LOOKUP_NAMES = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}


@dataclass(frozen=True)
class WeightEntry:
    """One adapted weight, as a file describes it."""

    path: str
    """The layer's name in the model."""
    parameter: str
    mode: Mode | None
    """How it was adapted; None if the file does not say."""
    shape: tuple[int, ...] | None
    dtype: str | None
    sample: str | None
    """The base weight's fingerprint."""
    slices: tuple[str, ...] = ()
    """The names of the slices that were adapted, each by itself; empty if it is the parameter as a whole."""

    @classmethod
    def of(cls, site: Site, name: str) -> "WeightEntry":
        """The entry for a live weight."""
        weight = base_weight(site.layer, site.parameter)
        update = site.adapted[name]
        dtype = str(weight.dtype).removeprefix("torch.")
        sample, slices = fingerprint(weight), update.kind.slices
        return cls(site.path, site.parameter, update.mode, tuple(weight.shape), dtype, sample, slices)

    @property
    def name(self) -> str:
        """The weight's full name in the model."""
        return ".".join(part for part in (self.path, self.parameter) if part)


def file_key(path: str, parameter: str, file_name: str, lookup: bool) -> str:
    """The key of a tensor, as PEFT has it: a layer's own weight goes by the layer's name, look-ups have names apart."""
    file_name = _LOOKUP_NAMES.get(file_name, file_name) if lookup else file_name
    parts = (path, "" if parameter == "weight" else parameter, file_name)
    return _PREFIX + ".".join(part for part in parts if part)


@dataclass(frozen=True)
class Header:
    """All that is known of an adapter but its tensors."""

    name: str
    variant: Variant
    weights: tuple[WeightEntry, ...]
    ours: bool = True
    """Whether lorakit wrote it. PEFT computes in float32 with tensors that its file holds in 16 bits; so do we."""

    def to_json(self) -> str:
        """The text that `parse_header` reads."""
        return json.dumps(
            {
                "version": _VERSION,
                "name": self.name,
                "variant": {"type": type(self.variant).__name__, **asdict(self.variant)},  # type: ignore[call-overload]
                "weights": [asdict(entry) for entry in self.weights],
            },
            separators=(",", ":"),
        )


def parse_header(text: str, where: str) -> Header:
    """The header in a file's metadata.

    Raises:
        LorakitError: it is damaged, or of a version that is not known here.
    """
    raw = parse_json_object(text, f"the lorakit header of {where}")
    if raw.get("version") != _VERSION:
        raise LorakitError(f"{where} has a header of version {raw.get('version')!r}; this lorakit reads {_VERSION}")
    try:
        fields = dict(raw["variant"])
        variant = VARIANTS[fields.pop("type")](**fields)
        weights = tuple(_entry(entry) for entry in raw["weights"])
        name = raw["name"]
        if not isinstance(name, str):
            raise TypeError("the name is no string")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
        raise LorakitError(f"the lorakit header of {where} is damaged: {what}; save the adapter again") from None
    return Header(name, variant, weights)


def _entry(raw: Mapping[str, Any]) -> WeightEntry:
    entry = WeightEntry(**{**raw, "shape": tuple(raw["shape"]), "slices": tuple(raw.get("slices", ()))})
    words = (entry.path, entry.parameter, entry.dtype, *entry.slices)
    if not all(isinstance(word, str) for word in words) or entry.mode not in ("beside", "weight"):
        raise TypeError(f"{raw!r}")
    if not all(isinstance(size, int) and size >= 0 for size in raw["shape"]):
        raise TypeError(f"shape {raw['shape']!r}")
    if entry.sample is not None and not isinstance(entry.sample, str):
        raise TypeError(f"sample {entry.sample!r}")
    return entry


def peft_config(header: Header, model: nn.Module) -> dict[str, Any]:
    """What PEFT, vLLM and llama.cpp ask of `adapter_config.json`."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "revision": None,
        **header.variant.peft_fields(),
        "target_modules": [entry.path if entry.parameter == "weight" else entry.name for entry in header.weights],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": any(
            isinstance(kind, TransposedLinear)
            for entry in header.weights
            for kind in kinds_of(model.get_submodule(entry.path))
        ),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_disagreements(header: Header, config: Mapping[str, Any]) -> list[str]:
    """Which fields of a config contradict the header it lies beside."""
    known = {"peft_type": "LORA", "bias": "none", **header.variant.peft_fields()}
    return [key for key, value in known.items() if config.get(key, value) != value] + [
        key for key, value in config.items() if value and key not in _UNDERSTOOD
    ]


# Fields of PEFT's config that do not change what the tensors mean: what is read here, where they came from, and where
# they were put, which their keys say. Any other field that is set makes the file one that is not understood.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal")


def header_from_peft(config: Mapping[str, Any], keys: list[str], path: Path) -> Header:
    """The header of a directory that PEFT wrote: plain LoRA.

    Raises:
        LorakitError: it is another method, or has parts that are not read; each is named.
    """
    if config.get("peft_type") != "LORA":
        raise LorakitError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be read")
    unread = [f"{key}={value!r}" for key, value in config.items() if value and key not in _UNDERSTOOD]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _KEEPS_THE_BASE:
        unread.append(f"init_lora_weights={start!r}, which changes the base")
    if config.get("bias", "none") != "none":
        unread.append(f"bias={config['bias']!r}")
    if unread:
        raise LorakitError(f"{path} has what cannot be read yet: {', '.join(unread)}")
    if "r" not in config or "lora_alpha" not in config:
        raise LorakitError(f"{path}: its config has no 'r' or no 'lora_alpha', and a scale is never guessed")
    try:
        variant = LoRA(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            scaling="rslora" if config.get("use_rslora") else "standard",
        )
    except LorakitError as error:
        raise LorakitError(f"{path}: in its config, {error}") from None
    first = LoRA.file_names["A"]
    paths = {
        key.removeprefix(_PREFIX).removesuffix("." + name)
        for name in (first, _LOOKUP_NAMES[first])
        for key in keys
        if key.endswith("." + name)
    }
    entries = tuple(WeightEntry(layer, "weight", None, None, None, None) for layer in sorted(paths))
    return Header(path.name, variant, entries, ours=False)
