"""Keys of PEFT's layers that PEFT's own `save_pretrained` has not written: what is around a layer's name, taken off.

`model.state_dict()` of a PEFT model has the adapter's name in each key (`lora_A.default.weight`), the modules that are
trained as a whole beside those of the base (`modules_to_save.default.weight`, `original_module.weight`), and the names
of what had wrapped the model: DDP, `torch.compile`, FSDP, checkpointing. PEFT reads none of these, without a word.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.header import PREFIX
from lorakit.patterns import some

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that no layer has: each is in a key only where a module was wrapped."""
_NAMED = re.compile(
    r"(.+\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_E|trainable_tokens_delta|vera_lambda_[bd]"
    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?))\.([^.]+)(\.weight|\.bias|)"
)
"""A part of an adapter, a word, and how a parameter ends: the word is the adapter's name, unless it is the end."""
_BARE = (".lora_magnitude_vector",)
"""What is a module in memory and has no `.weight` in PEFT's files."""
_WHOLE = re.compile(r"(.+)\.modules_to_save\.(.+)")
_ORIGINAL = ".original_module."


class Tidied(NamedTuple):
    """The tensors under the keys that PEFT would have saved them by."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def tidied(content: Mapping[str, Tensor], path: Path) -> Tidied:
    """The same tensors under PEFT's keys; a file that has those already is as it was.

    Raises:
        LorakitError: it holds several adapters, or two tensors that would have one key.
    """
    tensors: dict[str, Tensor] = {}
    named = {key: _unwrapped(key) for key in content}
    adapters = dict.fromkeys(found[1] for key in named.values() if (found := _adapter_in(key)) is not None)
    if len(adapters) > 1:
        raise LorakitError(
            f"{path} holds the tensors of several adapters, {some(list(adapters))}, which are read one at a time: save "
            "each in a file of its own"
        )
    # Put into a model by `add_adapter`, PEFT has no class of its own around it.
    add = PREFIX if not any(key.startswith(PREFIX) for key in named.values()) else ""
    left_out, twice = [], []
    for key, tidy in named.items():
        if _ORIGINAL in tidy:  # the base's own, of which another copy was trained
            left_out.append(f"{key}, which is the base's")
            continue
        found = _adapter_in(tidy)
        tidy = add + _without_whole(tidy if found is None else found[0], adapters)
        if tidy in tensors:
            twice.append(key)
        tensors[tidy] = content[key]
    if twice:
        raise LorakitError(f"{path} holds a tensor under two names, and which is meant is not known: {some(twice)}")
    return Tidied(tensors, tuple(left_out))


def _unwrapped(key: str) -> str:
    """Without what wrapped the model; DDP's `module` is a layer's name anywhere but before PEFT's own."""
    key = ".".join(word for word in key.split(".") if word not in _WRAPPERS)
    return key.removeprefix("module.") if key.startswith(f"module.{PREFIX}") else key


def _adapter_in(key: str) -> tuple[str, str] | None:
    """The key without the adapter's name, and that name; None if it has none."""
    found = _NAMED.fullmatch(key)
    if found is None or (not found[3] and found[2] in ("weight", "bias")):
        return None
    return found[1] + ("" if found[1].endswith(_BARE) else found[3]), found[2]


def _without_whole(key: str, adapters: Mapping[str, None]) -> str:
    """The key of a module that was trained as a whole, as the base has it."""
    found = _WHOLE.fullmatch(key)
    if found is None:
        return key
    name, _, rest = found[2].partition(".")
    inner = rest if rest and (name in adapters or name == "default") else found[2]
    return f"{found[1]}.{inner}"
