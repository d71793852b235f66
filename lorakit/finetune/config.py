"""Configurations as text: a YAML file and `key=value` words become settings, and settings become a file again."""

import difflib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from lorakit.errors import LorakitError
from lorakit.finetune.settings import GROUPS, Settings

_WIDTH = 110
_EXAMPLES = {"model": "path/to/model", "data": "train.jsonl"}
"""What stands for a setting that has no default, in a new file."""


def load(path: Path | None, words: Sequence[str] = ()) -> Settings:
    """The settings of a file, with those of the words (`key=value`, `--key value`) in their place.

    Raises:
        LorakitError: the file cannot be read, or settings are unknown, missing or out of bounds: all of them, each
            with the nearest name or what is allowed.
    """
    values = {} if path is None else read_yaml(path)
    given = parse_words(words)
    for key, value in given.items():
        outer, _, inner = key.partition(".")
        if inner:
            held = values.get(outer) or {}
            if not isinstance(held, dict):
                raise LorakitError(f"{key}={value}: {outer} is no mapping")
            values[outer] = {**held, inner: value}
        else:
            values[key] = value
    return checked(values, "the command line" if path is None else str(path))


def checked(values: Mapping[str, Any], where: str) -> Settings:
    """Settings from plain values.

    Raises:
        LorakitError: they are none; every one that is wrong is listed.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        problems = [_problem(each) for each in error.errors()]
    except TypeError as error:  # a key that is no text
        problems = [str(error)]
    raise LorakitError("\n  ".join([f"{where}:", *dict.fromkeys(problems)]))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        LorakitError: there is none; YAML's own words say where it is wrong.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise LorakitError(f"{path} {what}; `lorakit init {path}` writes one with every setting")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Once)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise LorakitError(f"{path} is no readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise LorakitError(f"{path} must hold settings, key: value, not {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


class _Once(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key that stands twice is an error: one of the two would be lost unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`rank=8`, `--rank 8`, `--rank=8` and `--packing` as values, which are read as YAML.

    Raises:
        LorakitError: a word is none of these.
    """
    values: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        key, sign, text = word.removeprefix("--").partition("=")
        if not sign:
            if not word.startswith("--"):
                raise LorakitError(f"{word!r} is no setting; give key=value or --key value, and the config first")
            known = key.replace("-", "_").partition(".")[0] in Settings.model_fields
            flag = not left or left[0].startswith("--") or (known and _is_flag(key))
            text = "true" if flag else left.pop(0)
        key = key.replace("-", "_") if "." not in key else key
        if not key:
            raise LorakitError(f"{word!r} names no setting; give key=value")
        if key in values:
            raise LorakitError(f"{key} is given twice: {values[key]!r} and {text!r}")
        values[key] = _value(key, text)
    return values


def _is_flag(key: str) -> bool:
    return Settings.model_fields[key.replace("-", "_").partition(".")[0]].annotation is bool


def _value(key: str, text: str) -> Any:
    field = Settings.model_fields.get(key)
    if field is not None and (field.annotation is str or field.annotation == (str | None)):
        return None if text in ("null", "none", "") else text  # a name such as 2024 or on stays text
    try:
        return yaml.load(text, Loader=_Once) if text else None
    except yaml.YAMLError:
        return text


def _problem(error: Mapping[str, Any]) -> str:
    """One line for one thing that pydantic found."""
    where = ".".join(str(part) for part in error["loc"] if part in Settings.model_fields or isinstance(part, int))
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`lorakit train --help` lists the settings"
        return f"{key}: there is no such setting; {hint}"
    if error["type"] == "missing":
        return f"{key}: is missing; {Settings.model_fields[key].description}"
    says = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(says)
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = [str(choice) for choice in _choices(Settings.model_fields[key].annotation)]
        near = difflib.get_close_matches(error["input"], choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
    says = says.replace("Input should be", "must be")
    return f"{where or key}: {says[0].lower() + says[1:]}, and not {error['input']!r}{hint}"


def _choices(annotation: Any) -> Iterable[Any]:
    for part in get_args(annotation):
        yield from _choices(part) if get_args(part) else [part]


def described() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """For each group its title and (name, default, meaning) of its settings."""
    groups: dict[str, list[tuple[str, str, str]]] = {group: [] for group in GROUPS}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        default = _EXAMPLES.get(name) if field.is_required() else field.default
        says, choices = (
            field.description or "",
            [choice for choice in _choices(field.annotation) if type(choice) is str],
        )
        if len(choices) > 1 and choices[0] not in says:
            says = f"{', '.join(choices)}: {says}"
        groups[str(extra["group"])].append((name, flow(default), says))
    return [(GROUPS[group], rows) for group, rows in groups.items()]  # type: ignore[index]


def template(given: Mapping[str, Any] | None = None) -> str:
    """A new configuration: every setting with its default and its meaning; those given in their place."""
    given = dict(given or {})
    lines = ["# lorakit train THIS_FILE [key=value ...]      # --dry-run shows the plan and stops", ""]
    for title, rows in described():
        lines += [f"# {title}", ""]
        for name, default, says in rows:
            value = flow(given[name]) if name in given else default
            lines += textwrap.wrap(says, _WIDTH, initial_indent="# ", subsequent_indent="# ")
            lines += [f"{name}: {value}"]
        lines.append("")
    return "\n".join(lines)


def dumped(settings: Settings) -> str:
    """The settings as YAML."""
    return "".join(f"{name}: {flow(value)}\n" for name, value in settings.model_dump().items())


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
