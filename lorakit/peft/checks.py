"""A config of PEFT is anybody's: the types of the fields that are used, before they are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _texts(value: Any) -> bool:
    return isinstance(value, str) or _names(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(each) is int for each in value)


def _mapping(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and holds(each) for key, each in value.items())


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("a name", lambda value: isinstance(value, str)),
    "task_type": ("a name", lambda value: isinstance(value, str)),
    "base_model_name_or_path": ("a name", lambda value: isinstance(value, str)),
    "bias": ("'none', 'all' or 'lora_only'", lambda value: isinstance(value, str)),
    "rank_pattern": ("ranks by pattern", lambda value: _mapping(value, lambda rank: type(rank) in (int, list))),
    "alpha_pattern": ("numbers by pattern", lambda value: _mapping(value, _number)),
    "modules_to_save": ("a list of names", _names),
    "target_modules": ("a list of names, or a pattern", _texts),
    "target_parameters": ("a list of names", _names),
    "trainable_token_indices": (
        "a list of indices, or one by layer",
        lambda value: _integers(value) or _mapping(value, _integers),
    ),
    **{
        name: ("true or false", lambda value: isinstance(value, bool))
        for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")
    },
}


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Whether the fields that are used are of the types that PEFT has there.

    Raises:
        LorakitError: some are not: all of them in one error.
    """
    problems = [
        f"{name}={str(config[name])[:80]!r} must be {what}"
        for name, (what, holds) in _FIELDS.items()
        if config.get(name) is not None and not holds(config[name])
    ]
    if problems:
        raise LorakitError(f"{path}: its config makes no sense: {'; '.join(problems)}")
