"""The native form, which is PEFT's with a header of ours in it; and PEFT's own, with or without a config."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.form import Format, Known, Written
from lorakit.header import PREFIX, Header, parse_header
from lorakit.native import native_files
from lorakit.peft_config import header_from_peft, peft_disagreements
from lorakit.variants import LoRA

_CONFIG = "adapter_config.json"


def read_native(content: Content, known: Known) -> Adapter:
    """What lorakit wrote."""
    return Adapter.of(native_header(content), content.tensors, str(content.path))


def native_parts(content: Content, known: Known) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of what lorakit wrote."""
    return native_header(content), dict(content.tensors)


def native_header(content: Content) -> Header:
    """The header of a file of ours, checked against the config beside it.

    Raises:
        LorakitError: it is damaged, or the two are of different saves.
    """
    header = parse_header(content.metadata["lorakit"], str(content.file))
    if content.config is not None and (fields := peft_disagreements(header, content.config)):
        raise LorakitError(
            f"{content.path}: {_CONFIG} and {content.file.name} are of two different saves: they disagree on "
            f"{', '.join(fields)}; save again, or delete {_CONFIG} to trust the tensors' own header"
        )
    return header


def read_peft(content: Content, known: Known) -> Adapter:
    """What PEFT wrote."""
    header, tensors = _parts(content, known)
    missing = ("alpha",) if content.config is None and known.alpha is None else ()
    return Adapter.of(header, tensors, str(content.path), format="peft", missing=missing)


def peft_parts(content: Content, known: Known) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of what PEFT wrote.

    Raises:
        LorakitError: alpha is neither in the file nor given.
    """
    if content.config is None and known.alpha is None:
        raise LorakitError(
            f"{content.path} has no {_CONFIG} beside it to say its alpha, and that is never guessed: give alpha=..."
        )
    return _parts(content, known)


def _parts(content: Content, known: Known) -> tuple[Header, dict[str, Tensor]]:
    tensors = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in content.tensors.items()}
    if content.config is None:
        return _without_config(tensors, known, content.path), tensors
    if known.alpha is not None:
        raise LorakitError(f"{content.path}: its {_CONFIG} says its alpha: leave alpha= away")
    header = header_from_peft(content.config, tensors, content.path)
    return header, {key: tensor for key, tensor in tensors.items() if key not in header.variant.shared_names}


def write_native(adapter: Adapter, known: Known) -> Written:
    """Everything: nothing is lost."""
    if adapter.naming:
        raise LorakitError(
            f"{adapter.name!r} has the names of {adapter.format}, not of a model's layers: name the model's first"
        )
    return Written(native_files(adapter.header, adapter.state_dict()))


def _without_config(tensors: Mapping[str, Tensor], known: Known, path: Path) -> Header:
    """The header for factors whose config is lost: ranks are in the shapes, alpha is not."""
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight") and tensor.dim() >= 1
    }
    if not ranks:
        raise LorakitError(f"{path} has no {_CONFIG} beside it, and only plain LoRA is read without")
    common = Counter(ranks.values()).most_common(1)[0][0]
    alpha = known.alpha or common
    # What is no factor can only be modules that were saved as a whole, or biases.
    config: dict[str, Any] = {"peft_type": "LORA", "r": common, "lora_alpha": alpha, "bias": "all"}
    header = header_from_peft(config, tensors, path)
    assert isinstance(header.variant, LoRA)
    own = {name: replace(header.variant, rank=rank, alpha=known.alpha or rank) for name, rank in ranks.items()}
    entries = tuple(
        entry if own[entry.path] == header.variant else entry._replace(variant=own[entry.path])
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
PEFT = Format("peft", "Hugging Face PEFT", _is_peft, read_peft, parts=peft_parts, takes=("alpha",), directory=True)
