"""Adapters onto a base, each checked against it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.attach import remove
from lorakit.errors import LorakitError
from lorakit.exchange import read
from lorakit.files import Verify, load
from lorakit.finetune.other_dtype import in_other_dtype
from lorakit.finetune.resolve import adapter_at
from lorakit.header import WeightEntry
from lorakit.resident import adapters


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
    place = adapter_at(path)
    note = None
    if verify == "sample":
        found = _in_other_dtype(model, place)
        if found is not None:
            verify, note = "off", found
    before = set(adapters(model))
    if name is not None and name in before:
        raise LorakitError(f"an adapter {name!r} is loaded already: call this one otherwise (NAME=PATH)")
    try:
        load(model, place, name, verify=verify)
    except LorakitError as error:
        if verify != "off" and _only_values_differ(model, place, verify):
            raise LorakitError(
                f"{error}\nThe base is not the one that this adapter was trained on, or has changed since: open that "
                "one. If it is meant to act here, load it unchecked: --verify off"
            ) from None
        raise
    (new,) = set(adapters(model)) - before
    return Loaded(new, None if note is None else f"{new}: {note}")


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


def _only_values_differ(model: nn.Module, place: Path, verify: Verify) -> bool:
    """Whether an adapter fits but for the base's values: it loads unchecked, and checked under no name."""
    name = "_"
    while name in adapters(model):
        name += "_"
    for checked in (verify, "off"):
        try:
            load(model, place, name, verify=checked)
        except LorakitError:
            continue
        remove(model, name)
        return checked == "off"
    return False


def _in_other_dtype(model: nn.Module, place: Path) -> str | None:
    """What is to be said if the base differs from that of training in its dtype; None if not, or in more than that."""
    try:
        entries = [weight.entry for weight in read(place).weights]
    except LorakitError:
        return None  # loading says what is wrong
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
