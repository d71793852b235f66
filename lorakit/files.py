"""Adapters as files: a directory in PEFT's layout, or the same content in one `.safetensors` file.

The directory holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT and the engines that read its
files understand. What PEFT has no field for (how each weight is adapted, fingerprints of the base) is JSON under
"lorakit" in the safetensors header, so the one file holds everything.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lorakit.change import add
from lorakit.errors import LorakitError, printable
from lorakit.fingerprint import whole
from lorakit.header import Header, WeightEntry, file_key
from lorakit.layers import parts_of
from lorakit.loading import build_additions
from lorakit.native import native_files, write_files
from lorakit.padding import pad
from lorakit.peft.config import facts_of
from lorakit.plan import Plan
from lorakit.state import Site, State, check_addition, check_complete, one_name, require, unwrapped
from lorakit.storage import one_writes
from lorakit.values.adapter import Adapter, check_known
from lorakit.variants.low_rank import checked_rank

Verify = Literal["sample", "full", "off"]
_MOST, _LONGEST = 40, 300
"""Of what a warning names, and characters of each."""


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter, detached, under the keys of PEFT's files: what `save` writes.

    For LoRA `base_model.model.<layer>.lora_A.weight` (r, k) and `….lora_B.weight` (d, r). Without a name: the only
    resident adapter.

    Raises:
        LorakitError: there is no such adapter, or there are several and no name.
    """
    root, state = require(model, None if name is None else [name])
    name = one_name(state, name)
    return _tensors(check_complete(root, state, name), state, name)


def _tensors(mine: list[Site], state: State, name: str) -> dict[str, Tensor]:
    """The tensors at these sites of an adapter, by their keys in a file."""
    return {
        file_key(site.path, site.parameter, variant.file_names[tensor], site.adapted[name].kind.lookup): value
        for site in mine
        for variant in [state.weights[name][site.name]]
        for tensor, value in site.adapted[name].saved().items()
    }


def adapter_value(model: nn.Module, name: str | None = None) -> Adapter:
    """One adapter of a model as a value: what `save` writes, for arithmetic, for `write` and for other models.

    Its tensors are the model's own, detached: a copy is made by whatever changes them.

    Raises:
        LorakitError: there is no such adapter, or there are several and no name.
    """
    root, state = require(model, None if name is None else [name])
    name = one_name(state, name)
    mine = check_complete(root, state, name)
    header = Header(name, state.variants[name], _entries(root, mine, state, name))
    header = replace(header, facts=facts_of(header, root))
    return Adapter.of(header, _tensors(mine, state, name), f"adapter {name!r}")


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter: a directory in PEFT's layout, or one file if `path` ends in ".safetensors".

    A file appears whole or not at all; what was there before under the same name is replaced. For a sharded model
    (FSDP2) every process must call this: the shards are gathered, the first process writes, the others wait for it.

    Args:
        model: the model that was given to `attach`.
        path: the directory or file; its parents are made.
        name: the adapter; by default the only resident one.

    Raises:
        LorakitError: no such adapter, it holds NaN or infinity, or the path cannot be written.
    """
    root, state = require(model, None if name is None else [name])
    name = one_name(state, name)
    mine = check_complete(root, state, name)
    header = Header(name, state.variants[name], _entries(root, mine, state, name, full=True))
    header = replace(header, facts=facts_of(header, root))
    tensors = _tensors(mine, state, name)
    files = native_files(header, {key: whole(tensor) for key, tensor in tensors.items()}, root)
    with one_writes(tensors.values()) as mine_to_write:
        if mine_to_write:
            write_files(files, path)


def _entries(root: nn.Module, mine: list[Site], state: State, name: str, full: bool = False) -> tuple[WeightEntry, ...]:
    """What the header says of each weight."""
    entries = []
    for site in mine:
        own = state.weights[name][site.name]
        entry = WeightEntry.of(site, name, None if own == state.variants[name] else own, full)
        parent, _, child = site.path.rpartition(".")
        if entry.order is not None and child in parts_of(root.get_submodule(parent)).read:
            entry = entry._replace(order=None)  # read past the call that PEFT wraps
        entries.append(entry)
    return tuple(entries)


def load(
    model: nn.Module,
    path: str | os.PathLike[str] | Adapter,
    name: str | None = None,
    *,
    verify: Verify = "sample",
    trainable: bool = False,
    rank: int | None = None,
    format: str | None = None,
    alpha: float | None = None,
    enabled: Sequence[bool] | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    part: str | None = None,
) -> Plan:
    """Add an adapter from a file of any format that `read` knows, or one that is a value.

    As with `attach`, the base is frozen and the new adapter becomes the only active one. Which of the others train
    does not change, unless this one is to train.

    Args:
        model: the base the adapter was trained on.
        path: a directory, a file, or an `Adapter`.
        name: what to call it here; by default the name it was saved under, or the path's own.
        verify: "sample" compares fingerprints of the adapted weights with those stored, "full" every byte of them by
            a checksum, which reads them all (some GB/s on one core); "off" does neither, for the same base in another
            dtype, say.
        trainable: whether to train it on.
        rank: fill the factors up with zeros to this rank, for the same ΔW: adapters of equal shapes are switched in
            compiled code without compiling anew.
        format: the format of the file, if it is not to be found from its keys.
        alpha: as for `read`, where the file does not hold it; and so
        enabled: which parts of a fused projection are adapted;
        heads: attention heads, if the model has no `config` that says it; and
        kv_heads: those of keys and values, if there are fewer;
        part: which model of a pipeline this is, if the file is about several.

    Returns:
        What was done; `print` it for a table.

    Warns:
        Where the file holds something beside the adapter, which is left out.

    Raises:
        LorakitError: the file is damaged or does not fit this model: one error that lists everything that is wrong
            (missing layers, shapes, missing or extra tensors, NaN, another base). The model is as it was.
    """
    if verify not in ("sample", "full", "off"):
        raise LorakitError(f"verify={verify!r} must be 'sample', 'full' or 'off'")
    from lorakit.formats import Known, Names, content_of, resolved, with_heads  # most programs read no file

    known = Known(alpha, None if enabled is None else tuple(enabled), heads, kv_heads, part)
    if isinstance(path, Adapter):
        adapter: Adapter | None = path
        where = f"the adapter {path.name!r}"
    else:
        where = os.fspath(path)
        content, form = content_of(Path(path), format, known)
        parts = None if form.parts is None else form.parts(content, known)
        if parts is not None:  # the model says of each tensor whether it fits, in one error
            adapter, (header, tensors) = None, parts
        else:
            if "heads" in form.takes:
                known = with_heads(known, Names.of_model(unwrapped(model)).config)
            adapter = form.read(content, known)
    if adapter is not None:
        check_known(adapter)
        adapter = resolved(adapter, Names.of_model(unwrapped(model)), known)
        header, tensors = adapter.header, adapter.state_dict()
    name = header.name if name is None else name
    root = check_addition(model, name)
    plan, additions = build_additions(root, header, tensors, name, verify=verify, where=where)
    if rank is not None:
        plan, additions = pad(plan, additions, checked_rank(rank))
    add(root, name, plan.variant, additions, trainable=trainable)
    if adapter is not None and adapter.left_out:
        shown = printable(", ".join(what[:_LONGEST] for what in adapter.left_out[:_MOST]))
        more = f" and {len(adapter.left_out) - _MOST} more" if len(adapter.left_out) > _MOST else ""
        warnings.warn(f"{where} holds what is no part of the adapter: {shown}{more}", stacklevel=2)
    return plan
