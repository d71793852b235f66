"""Adapters onto a base, each checked against it."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.attach import remove
from lorakit.checkpoints.checkpoint import shortened
from lorakit.errors import LorakitError
from lorakit.exchange import read
from lorakit.files import Verify, load
from lorakit.finetune.other_dtype import in_other_dtype, without_rounded
from lorakit.finetune.resolve import adapter_at
from lorakit.header import WeightEntry
from lorakit.layers import as_foreign
from lorakit.resident import adapters
from lorakit.values.adapter import Adapter


class Loaded(NamedTuple):
    """An adapter on a base."""

    name: str
    note: str | None
    """What is to be said of it."""


def load_adapter(model: nn.Module, path: str | Path, name: str | None = None, verify: Verify = "sample") -> Loaded:
    """Load an adapter beside those that are there; it becomes the active one.

    A base in another dtype than in training is checked too, as far as rounding lets it.

    Args:
        model: the base's model.
        path: an adapter of any format, a run directory, or a checkpoint of one.
        name: what to call it; by default what its file does.
        verify: as for `lorakit.load`.

    Raises:
        LorakitError: it cannot be read, does not fit, is of another base, or one of this name is there.
    """
    return _load(model, adapter_at(path), name, verify)


def load_value(model: nn.Module, adapter: Adapter, name: str | None = None, verify: Verify = "sample") -> Loaded:
    """The same for an adapter that was read.

    Raises:
        LorakitError: it does not fit, is of another base, or one of this name is there.
    """
    return _load(model, adapter, name, verify)


def _load(model: nn.Module, source: Path | Adapter, name: str | None, verify: Verify) -> Loaded:
    notes: list[str] = []
    if verify == "sample":
        source, rounded = _without_rounded(model, source)
        other = _in_other_dtype(model, source)
        verify = "sample" if other is None else "off"
        notes = [note for note in (rounded, other) if note is not None]
    before = set(adapters(model))
    if name is not None and name in before:
        raise LorakitError(f"an adapter {name!r} is loaded already: call this one otherwise (NAME=PATH)")
    try:
        load(model, source, name, verify=verify)
    except LorakitError as error:
        said = re.sub(r"use verify='(\w+)'", r"give --verify \1", shortened(str(error)))
        if verify != "off" and _only_values_differ(model, source, verify):
            raise LorakitError(
                f"{said}\nThe base is not the one that this adapter was trained on, or has changed since: open that "
                "one. If it is meant to act here, load it unchecked: --verify off"
            ) from None
        raise LorakitError(said) from None
    (new,) = set(adapters(model)) - before
    return Loaded(new, f"{new}: {'; '.join(notes)}" if notes else None)


def load_adapters(model: nn.Module, given: Sequence[tuple[str | None, str | Path]], verify: Verify) -> list[Loaded]:
    """Load several, in this order.

    Raises:
        LorakitError: one of them cannot be loaded.
    """
    return [load_adapter(model, path, name, verify) for name, path in given]


def named_path(text: str) -> tuple[str | None, str]:
    """(name, path) of NAME=PATH, or of a path alone.

    Raises:
        LorakitError: it is neither.
    """
    name, equals, path = text.partition("=")
    if Path(text).expanduser().exists() or not equals:
        return None, text
    if not name.strip() or not path.strip():
        raise LorakitError(f"{text!r} is no adapter: give NAME=PATH, or a path")
    return name.strip(), path.strip()


def _only_values_differ(model: nn.Module, source: Path | Adapter, verify: Verify) -> bool:
    """Whether an adapter fits but for the base's values: it loads unchecked, and checked under no name."""
    name = "_"
    while name in adapters(model):
        name += "_"
    for checked in (verify, "off"):
        try:
            load(model, source, name, verify=checked)
        except LorakitError:
            continue
        remove(model, name)
        return checked == "off"
    return False


def _without_rounded(model: nn.Module, source: Path | Adapter) -> tuple[Path | Adapter, str | None]:
    """What is to be loaded, and what is to be said: weights that are rounded otherwise here cannot be checked."""
    try:
        adapter = source if isinstance(source, Adapter) else read(source)
    except LorakitError:
        return source, None  # loading says what is wrong
    stripped, said = without_rounded(adapter, partial(_scheme, model))
    return (source, None) if said is None else (stripped, said)


def _scheme(model: nn.Module, entry: WeightEntry) -> str | None:
    """How the weight that an entry is of is quantized; None if it is not, or there is none."""
    try:
        kind = as_foreign(model.get_submodule(entry.path))
    except AttributeError:
        return None
    return None if kind is None else kind.scheme or None


def _in_other_dtype(model: nn.Module, source: Path | Adapter) -> str | None:
    """What is to be said if the base differs from that of training in its dtype; None if not, or in more than that."""
    try:
        adapter = source if isinstance(source, Adapter) else read(source)
    except LorakitError:
        return None  # loading says what is wrong
    entries = [weight.entry for weight in adapter.weights if weight.entry.sample is not None]
    found = in_other_dtype(entries, partial(_parameter, model))
    if found is None:
        return None
    how = "else the same" if found == "same" else "was rounded, so it was not checked against it"
    return f"the base is in another dtype than in training ({entries[0].dtype}), and {how}"


def _parameter(model: nn.Module, entry: WeightEntry) -> Tensor | None:
    """The stored weight that an entry is of; None if there is none of this name and shape."""
    try:
        found = model.get_submodule(entry.path)._parameters.get(entry.parameter)
    except AttributeError:
        return None
    return found if found is not None and tuple(found.shape) == entry.shape else None
