"""What a file says about the adapter in it, as JSON in its metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import nn

from lorakit.errors import LorakitError
from lorakit.fingerprint import fingerprint, remembered_checksum
from lorakit.layers import Mode, Parameter, outline, stored_dtype, stored_tensors
from lorakit.state import Site
from lorakit.storage import parse_json_object
from lorakit.variants import VARIANTS, Variant

_VERSION = 1
PREFIX = "base_model.model."
LOOKUP_NAMES = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}


class WeightEntry(NamedTuple):
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
    variant: Variant | None = None
    """Its own variant; None if it is the adapter's."""
    slices: tuple[str, ...] = ()
    """The names of the slices that were adapted, each by itself; empty if it is the parameter as a whole."""
    kind: str | None = None
    """The name of the kind's class, which says how the weight is seen as a matrix; None if the file does not say."""
    padding_idx: int | None = None
    """The column that no update changes."""
    full: str | None = None
    """The checksum of the base weight, every byte of it; None if the file does not say."""
    order: int | None = None
    """Which of its module's parameters it is, in the order of their declaration, if PEFT can hold it as such."""
    transposed: bool = False
    """Whether the module multiplies by it from the right, x·W: PEFT then has the factors the other way round."""

    groups: int = 1
    """The groups of a convolution, which its factors' shapes do not tell."""

    @classmethod
    def of(cls, site: Site, name: str, variant: Variant | None, full: bool = False) -> "WeightEntry":
        """The entry for a live weight; with its checksum if `full`, for which all of it is read."""
        update = site.adapted[name]
        stored = stored_tensors(site.layer, site.parameter)
        shape = tuple(outline(site.layer, update.kind).shape)
        dtype, kind = stored_dtype(site.layer, update.kind), update.kind
        how = (variant, kind.slices, type(kind).__name__, kind.padding_idx)
        sample = fingerprint(*stored)
        prints = sample, *how, remembered_checksum(sample, *stored) if full else None
        order = _order(site) if isinstance(kind, Parameter) else None
        transposed = order is not None and bool(getattr(site.layer, "is_transposed", False))
        groups: Any = getattr(site.layer, "groups", 1) if isinstance(site.layer, nn.modules.conv._ConvNd) else 1
        return cls(site.path, site.parameter, update.mode, shape, dtype, *prints, order, transposed, groups)

    @property
    def name(self) -> str:
        """The weight's full name in the model."""
        return f"{self.path}.{self.parameter}" if self.path and self.parameter else self.path or self.parameter


def _order(site: Site) -> int | None:
    """The place of a parameter among its module's, where PEFT finds it by its name and the module then sees it."""
    blind = isinstance(site.layer, nn.RNNBase | nn.MultiheadAttention)  # lists and fused paths of torch's own
    blind = blind or type(site.layer).forward is nn.Module.forward  # a list of parameters, which others read
    declared = [name for name, parameter in site.layer._parameters.items() if parameter is not None]
    return None if blind or not site.path or site.parameter not in declared else declared.index(site.parameter)


def file_key(path: str, parameter: str, file_name: str, lookup: bool) -> str:
    """The key of a tensor, as PEFT has it: a layer's own weight goes by the layer's name, look-ups have names apart."""
    file_name = LOOKUP_NAMES.get(file_name, file_name) if lookup else file_name
    parts = (path, "" if parameter == "weight" and file_name else parameter, file_name)
    return PREFIX + ".".join(part for part in parts if part)


@dataclass(frozen=True)
class Header:
    """All that is known of an adapter but its tensors."""

    name: str
    variant: Variant
    weights: tuple[WeightEntry, ...]
    ours: bool = True
    """Whether lorakit wrote it. PEFT computes in float32 with tensors that its file holds in 16 bits; so do we."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known and worth keeping, as JSON has it: "base", the name of the model it was trained on, say."""

    def variant_of(self, entry: WeightEntry) -> Variant:
        """The variant of one weight."""
        return self.variant if entry.variant is None else entry.variant

    def to_json(self) -> str:
        """The text that `parse_header` reads."""
        return json.dumps(
            {
                "version": _VERSION,
                "name": self.name,
                "variant": variant_to_json(self.variant),
                **({} if self.ours else {"ours": False}),
                **({"facts": dict(self.facts)} if self.facts else {}),
                "weights": [
                    {**entry._asdict(), "variant": None if entry.variant is None else variant_to_json(entry.variant)}
                    for entry in self.weights
                ],
            },
            separators=(",", ":"),
        )


def variant_to_json(variant: Variant) -> dict[str, Any]:
    """Its name and its hyper-parameters."""
    return {"type": type(variant).__name__, **asdict(variant)}


def variant_from_json(raw: Mapping[str, Any]) -> Variant:
    """The inverse of `variant_to_json`."""
    fields = dict(raw)
    return VARIANTS[fields.pop("type")](**fields)


def parse_header(text: str, where: str) -> Header:
    """The header in a file's metadata.

    Raises:
        LorakitError: it is damaged, or of a version that is not known here.
    """
    raw = parse_json_object(text, f"the lorakit header of {where}")
    if raw.get("version") != _VERSION:
        raise LorakitError(f"{where} has a header of version {raw.get('version')!r}; this lorakit reads {_VERSION}")
    try:
        variant = variant_from_json(raw["variant"])
        weights = tuple(_entry(entry) for entry in raw["weights"])
        name, ours, facts = raw["name"], raw.get("ours", True), raw.get("facts", {})
        for what, value, kind in (("name", name, str), ("ours", ours, bool), ("facts", facts, dict)):
            if not isinstance(value, kind):
                raise TypeError(f"{what} {value!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
        raise LorakitError(f"the lorakit header of {where} is damaged: {what}; save the adapter again") from None
    return Header(name, variant, weights, ours, facts)


def _entry(raw: Mapping[str, Any]) -> WeightEntry:
    own, shape = raw.get("variant"), raw["shape"]
    given = {"shape": None if shape is None else tuple(shape), "slices": tuple(raw.get("slices", ()))}
    entry = WeightEntry(**{**raw, **given, "variant": None if own is None else variant_from_json(own)})
    if not all(isinstance(word, str) for word in (entry.path, entry.parameter, *entry.slices)):
        raise TypeError(f"{raw!r}")
    if entry.mode not in (None, "beside", "weight"):
        raise TypeError(f"mode {entry.mode!r}")
    if not all(type(size) is int and size >= 0 for size in entry.shape or ()):
        raise TypeError(f"shape {shape!r}")
    if not all(isinstance(word, str | None) for word in (entry.dtype, entry.sample, entry.kind, entry.full)):
        raise TypeError(f"dtype {entry.dtype!r}, sample {entry.sample!r}, kind {entry.kind!r}, full {entry.full!r}")
    if type(entry.groups) is not int or entry.groups < 1:
        raise TypeError(f"groups {entry.groups!r}")
    if not isinstance(entry.padding_idx, int | None):
        raise TypeError(f"padding_idx {entry.padding_idx!r}")
    if type(entry.transposed) is not bool or not (entry.order is None or type(entry.order) is int):
        raise TypeError(f"order {entry.order!r}, transposed {entry.transposed!r}")
    return entry
