"""Adapters as values, from files of any format and into them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.native import write_files
from lorakit.values.adapter import Adapter, check_known


def read(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    alpha: float | None = None,
    enabled: Sequence[bool] | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Adapter:
    """The adapter in a file or directory of any format that is known, as a value. No code in it is ever run.

    Args:
        path: a directory, or a file.
        format: its format; by default found from its keys.
        alpha: the numerator of the scale, where the format does not hold it. Without it the adapter can be looked at,
            and nothing that depends on its scale be done.
        enabled: for fused projections, where the format does not say it: which of their parts are adapted, such as
            (True, False, True) for q and v.
        heads: attention heads of the model, where the format has the rows of q and k in another order.
        kv_heads: heads of keys and values, if there are fewer.

    Raises:
        LorakitError: it does not exist, is damaged, or of no format that is known; or something is given that it
            holds itself.
    """
    from lorakit.formats import Known, read_adapter  # most programs read no file

    known = Known(alpha, None if enabled is None else tuple(enabled), heads, kv_heads)
    return read_adapter(Path(path), format, known)


def renamed_for(
    adapter: Adapter,
    names: Sequence[str] | nn.Module | Mapping[str, Tensor] | os.PathLike[str],
    *,
    part: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Adapter:
    """The adapter with the names of a model's layers, where its file had others: flattened, numbered, of a pipeline.

    Args:
        adapter: what `read` gave.
        names: the model, the path of a checkpoint, tensors by their names, or the names of its parameters.
        part: which model of a pipeline it is, if the adapter is about several.
        heads: attention heads, if the model has no config that says it; and
        kv_heads: those of keys and values, if there are fewer.

    Raises:
        LorakitError: names that fit no layer, or several: all of them in one error.
    """
    from lorakit.formats import Known, Names, resolved

    if isinstance(names, nn.Module):
        target = Names.of_model(names)
    elif isinstance(names, Mapping | os.PathLike):
        target = Names.of_checkpoint(names)
    else:
        target = Names.of_list(names)
    return resolved(adapter, target, Known(heads=heads, kv_heads=kv_heads, part=part))


def write(
    adapter: Adapter, path: str | os.PathLike[str], format: str = "lorakit", *, portable: bool = False, **known: Any
) -> tuple[str, ...]:
    """Write an adapter in any format that is known; a file appears whole or not at all.

    Args:
        adapter: what `read`, `adapter_value` or arithmetic gave.
        path: a directory, or a file with a suffix of the format.
        format: "lorakit" is the native form, which PEFT reads too.
        portable: fold every scale into B and fill all ranks up to one, for engines that know but one scale: vLLM and
            llama.cpp. The ΔW is the same (`lorakit.values.portable.portable`).
        **known: what the format needs and the adapter does not say: heads, kv_heads, part, arch.

    Returns:
        What the format has no place for and no output depends on, such as dropout; and, if it is to be portable, what
        engines refuse of it.

    Raises:
        LorakitError: the format cannot hold something that outputs depend on: all of it in one error; or the path
            cannot be written; or something is given that the format has no use for.
    """
    from lorakit.formats import Known, check_needed, form_named

    form, given = form_named(format), Known(**known)
    if form.write is None:
        raise LorakitError(f"{format} is read, not written")
    check_needed(f"writing {format}", given, form.asks)
    check_known(adapter)
    notes: tuple[str, ...] = ()
    if portable:
        from lorakit.values.portable import portable as one_scale

        adapter, notes = one_scale(adapter)
    written = form.write(adapter, given)
    write_files(written.files, path, form.suffixes)
    return written.lost + notes
