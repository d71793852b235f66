"""Adapters as files: a directory in PEFT's layout, or the same content in one `.safetensors` file.

The directory holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT and the engines that read its
files understand. What PEFT has no field for (how each weight is adapted, fingerprints of the base) is JSON under
"lorakit" in the safetensors header, so the one file holds everything.
"""

import json
import os
from pathlib import Path
from typing import Literal

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lorakit.change import add
from lorakit.errors import LorakitError
from lorakit.fingerprint import whole
from lorakit.header import Header, WeightEntry, file_key, parse_header
from lorakit.loading import build_additions
from lorakit.padding import pad
from lorakit.peft_config import header_from_peft, peft_config, peft_disagreements
from lorakit.plan import Plan
from lorakit.state import Site, State, check_addition, check_complete, one_name, require
from lorakit.storage import all_finite, read_json_object, read_tensors, write_whole
from lorakit.variants.low_rank import checked_rank

Verify = Literal["sample", "off"]

_TENSORS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


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


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter: a directory in PEFT's layout, or one file if `path` ends in ".safetensors".

    A file appears whole or not at all; what was there before under the same name is replaced.

    Args:
        model: the model that was given to `attach`.
        path: the directory or file; its parents are made.
        name: the adapter; by default the only resident one.

    Raises:
        LorakitError: no such adapter, it holds NaN or infinity, or the path cannot be written.
    """
    if not os.fspath(path):
        raise LorakitError("cannot write an adapter to an empty path: name a directory, or a .safetensors file")
    path = Path(path)
    root, state = require(model, None if name is None else [name])
    name = one_name(state, name)
    mine = check_complete(root, state, name)
    tensors = {key: whole(tensor) for key, tensor in _tensors(mine, state, name).items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise LorakitError(f"adapter {name!r} is not saved: it is on 'meta' and has no values")
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    bad = [key for key, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise LorakitError(f"adapter {name!r} is not saved: NaN or infinity in {', '.join(bad)}")
    header = Header(name, state.variants[name], _entries(mine, state, name))
    content = to_safetensors(tensors, metadata={"format": "pt", "lorakit": header.to_json()})
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise LorakitError(f"cannot write {path}: it is a directory")
        write_whole(path, content)
        return
    if path.exists() and not path.is_dir():
        raise LorakitError(f"cannot write {path}: it is a file; name a directory, or a file ending in .safetensors")
    write_whole(path / _TENSORS, content)
    write_whole(path / _CONFIG, json.dumps(peft_config(header, root, tensors), indent=2).encode())


def _entries(mine: list[Site], state: State, name: str) -> tuple[WeightEntry, ...]:
    """What the header says of each weight."""
    entries = []
    for site in mine:
        own = state.weights[name][site.name]
        entries.append(WeightEntry.of(site, name, None if own == state.variants[name] else own))
    return tuple(entries)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    verify: Verify = "sample",
    trainable: bool = False,
    rank: int | None = None,
) -> Plan:
    """Add an adapter from a file that `save` wrote, or from a PEFT directory of plain LoRA.

    As with `attach`, the base is frozen and the new adapter becomes the only active one. Which of the others train
    does not change, unless this one is to train.

    Args:
        model: the base the adapter was trained on.
        path: a directory or a `.safetensors` file.
        name: what to call it here; by default the name it was saved under, or the path's own.
        verify: "sample" compares fingerprints of the adapted weights with those stored; "off" does not, for the same
            base in another dtype, say.
        trainable: whether to train it on.
        rank: fill the factors up with zeros to this rank, for the same ΔW: adapters of equal shapes are switched in
            compiled code without compiling anew.

    Returns:
        What was done; `print` it for a table.

    Raises:
        LorakitError: the file is damaged or does not fit this model: one error that lists everything that is wrong
            (missing layers, shapes, missing or extra tensors, NaN, another base). The model is as it was.
    """
    if verify not in ("sample", "off"):
        raise LorakitError(f"verify={verify!r} must be 'sample' or 'off'")
    path = Path(path)
    header, tensors = _read(path)
    name = header.name if name is None else name
    root = check_addition(model, name)
    plan, additions = build_additions(root, header, tensors, name, check_values=verify == "sample", where=str(path))
    if rank is not None:
        plan, additions = pad(plan, additions, checked_rank(rank))
    add(root, name, plan.variant, additions, trainable=trainable)
    return plan


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    if not path.exists():
        raise LorakitError(f"{path} does not exist; check the path")
    if not path.is_dir():
        tensors, metadata = read_tensors(path)
        if "lorakit" not in metadata:
            raise LorakitError(
                f"{path} does not say its alpha: it was not written by lorakit. Load the directory that has its "
                f"{_CONFIG}"
            )
        return parse_header(metadata["lorakit"], str(path)), tensors
    tensors, metadata = read_tensors(path / _TENSORS)
    config = read_json_object(path / _CONFIG) if (path / _CONFIG).exists() or "lorakit" not in metadata else None
    if "lorakit" not in metadata:
        assert config is not None
        tensors = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in tensors.items()}
        header = header_from_peft(config, tensors, path)
        return header, {key: tensor for key, tensor in tensors.items() if key not in header.variant.shared_names}
    header = parse_header(metadata["lorakit"], str(path / _TENSORS))
    if config is not None and (fields := peft_disagreements(header, config)):
        raise LorakitError(
            f"{path}: {_CONFIG} and {_TENSORS} are of two different saves: they disagree on {', '.join(fields)}; save "
            f"again, or delete {_CONFIG} to trust the tensors' own header"
        )
    return header, tensors
