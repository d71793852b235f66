"""The native form, which is PEFT's with a header of ours in it; and PEFT's own, with or without a config."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.peft_keys import NAMING, Theirs, understood
from lorakit.formats.peft_resolve import resolve_parameters
from lorakit.header import PREFIX, Header, parse_header
from lorakit.native import CONFIG, TENSORS, finite, native_files
from lorakit.peft.config import beyond_peft, peft_config, peft_disagreements
from lorakit.peft.fields import header_from_peft
from lorakit.peft.layout import from_peft, to_peft
from lorakit.values.adapter import Adapter
from lorakit.variants import LoRA


def read_native(content: Content, known: Known) -> Adapter:
    """What lorakit wrote."""
    header, tensors = native_parts(content, known)
    return Adapter.of(header, tensors, str(content.path))


def native_parts(content: Content, known: Known) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of what lorakit wrote."""
    header = native_header(content)
    return header, from_peft(header, content.tensors, str(content.path))


def native_header(content: Content) -> Header:
    """The header of a file of ours, checked against the config beside it.

    Raises:
        LorakitError: it is damaged, or the two are of different saves.
    """
    header = parse_header(content.metadata["lorakit"], str(content.file))
    if content.config is not None and (fields := peft_disagreements(header, content.config)):
        raise LorakitError(
            f"{content.path}: {CONFIG} and {content.file.name} are of two different saves: they disagree on "
            f"{', '.join(fields)}; save again, or delete {CONFIG} to trust the tensors' own header"
        )
    return header


def read_peft(content: Content, known: Known) -> Adapter:
    """What PEFT wrote."""
    header, tensors, unresolved = _parts(content, known)
    missing = ("alpha",) if content.config is None and known.alpha is None else ()
    naming = NAMING if unresolved else ""
    return Adapter.of(header, tensors, str(content.path), format="peft", missing=missing, naming=naming)


def peft_parts(content: Content, known: Known) -> tuple[Header, dict[str, Tensor]] | None:
    """The header and the tensors of what PEFT wrote; None if the model must say first what some of them mean.

    Raises:
        LorakitError: alpha is neither in the file nor given.
    """
    if content.config is None and known.alpha is None:
        raise LorakitError(
            f"{content.path} has no {CONFIG} beside it to say its alpha, and that is never guessed: give alpha=..."
        )
    header, tensors, unresolved = _parts(content, known)
    return None if unresolved else (header, tensors)


def _parts(content: Content, known: Known) -> Theirs:
    if content.config is None:
        tensors = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in content.tensors.items()}
        return Theirs(_without_config(tensors, known, content.path), tensors, False)
    if known.alpha is not None:
        raise LorakitError(f"{content.path}: its {CONFIG} says its alpha: leave alpha= away")
    return understood(content.config, content.tensors, content.path)


def write_native(adapter: Adapter, known: Known) -> Written:
    """Everything: nothing is lost."""
    _check_named(adapter)
    return Written(native_files(adapter.header, adapter.state_dict()))


def write_peft(adapter: Adapter, known: Known) -> Written:
    """PEFT's own two files, without what PEFT does not know.

    Raises:
        LorakitError: it could not have all that outputs depend on.
    """
    _check_named(adapter)
    header, tensors = adapter.header, adapter.state_dict()
    no_place("PEFT", beyond_peft(header, tensors))
    checked = finite(header.name, tensors)
    return Written(
        {
            TENSORS: to_safetensors(to_peft(header, checked), metadata={"format": "pt"}),
            CONFIG: json.dumps(peft_config(header, checked), indent=2).encode(),
        },
        ("fingerprints of the base, and how each weight was adapted",),
    )


def _check_named(adapter: Adapter) -> None:
    if adapter.naming:
        raise LorakitError(
            f"{adapter.name!r} has the names of {adapter.format}, not of a model's layers: name the model's first"
        )


def _without_config(tensors: Mapping[str, Tensor], known: Known, path: Path) -> Header:
    """The header for factors whose config is lost: ranks are in the shapes, alpha is not."""
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight") and tensor.dim() >= 1
    }
    if not ranks:
        raise LorakitError(f"{path} has no {CONFIG} beside it, and only plain LoRA is read without")
    common = Counter(ranks.values()).most_common(1)[0][0]
    alpha = known.alpha or common
    # What is no factor can only be modules that were saved as a whole, or biases.
    config: dict[str, Any] = {"peft_type": "LORA", "r": common, "lora_alpha": alpha, "bias": "all"}
    header = header_from_peft(config, tensors, path)
    assert isinstance(header.variant, LoRA)
    own = {name: replace(header.variant, rank=rank, alpha=known.alpha or rank) for name, rank in ranks.items()}
    entries = tuple(
        entry if own.get(entry.path, header.variant) == header.variant else entry._replace(variant=own[entry.path])
        for entry in header.weights
    )
    return replace(header, weights=entries)


def _is_native(content: Content) -> bool:
    return "lorakit" in content.metadata


def _is_peft(content: Content) -> bool:
    # torchtune writes PEFT's config beside weights under names of its own.
    if _is_native(content) or any(key.endswith(".lora_a.weight") for key in content.tensors):
        return False
    by_config = content.config is not None and "peft_type" in content.config
    return by_config or any(key.startswith(PREFIX) for key in content.tensors)


LORAKIT = Format("lorakit", "this library's own", _is_native, read_native, write_native, native_parts, directory=True)
PEFT = Format(
    *("peft", "Hugging Face PEFT", _is_peft, read_peft, write_peft, peft_parts),
    takes=("alpha",),
    directory=True,
    resolve={NAMING: resolve_parameters},
)
