"""Prompts from files: one a line, or the rows that training takes, which may lack their answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.finetune.data.columns import Layout
from lorakit.finetune.data.contents import BadRowError, maker_of
from lorakit.finetune.data.reading import form_of
from lorakit.finetune.data.text_files import read_text_file

_ANSWER = "answer"
"""Stands where a row lacks one, as rows to train on may not; it is taken out again."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how it is shown."""

    text: str
    content: str | Mapping[str, Any]
    where: str


def read_prompts(lines: Sequence[str], source: str) -> list[Prompt]:
    """Prompts, one a line; empty lines are none.

    Args:
        lines: of a file.
        source: its name, for messages.

    Raises:
        LorakitError: there is no prompt.
    """
    found = []
    for number, line in enumerate(lines, 1):
        text = line.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else line.rstrip("\r\n")
        if text.strip():
            found.append(Prompt(text, text, f"{source}:{number}"))
    return _some(found, source)


def prompts_at(path: Path, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts in a file: rows in the forms that `read_rows` knows, or lines of text if its name says nothing.

    Rows may lack their answers, and those that are there are left out. A line of JSON may be a text alone.

    Args:
        path: a text file, or .jsonl, .json, .csv, .tsv (also packed) or .parquet.
        columns: names by role, as for `read_rows`; a row without such a column is read by the names that are known.

    Raises:
        LorakitError: it cannot be read, holds none, or has rows that are none, all of which are named.
    """
    records: list[tuple[str, Any]]
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        records, bad = _json_lines(_text_of(path).split("\n"), str(path))
    elif (form := form_of(path)) is None:
        return read_prompts(_text_of(path).split("\n"), str(path))
    elif form == ".parquet":
        from lorakit.finetune.data.stored import read_parquet

        records, bad = [*read_parquet(path)], []
    else:
        read, bad = read_text_file(path, form)
        records = [*read]
    found = []
    for where, value in records:
        try:
            found.append(_prompt(value, where, columns or {}))
        except BadRowError as error:
            bad.append(f"{where}: {error}")
    if bad:
        raise LorakitError("\n  ".join([f"{path} has rows that are no prompts:", *bad]))
    return _some(found, str(path))


def _some(found: list[Prompt], source: str) -> list[Prompt]:
    if not found:
        raise LorakitError(f"{source} holds no prompt")
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 ({error})"
        raise LorakitError(f"cannot read the prompts in {path}: {reason}") from None


def _json_lines(lines: Iterable[str], source: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """The values in lines of JSON, each with its place, and what is wrong with the others."""
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        where = f"{source}:{number}"
        try:
            if line.strip():
                found.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            bad.append(f"{where}: {error}")
    return found, bad


_ASKED = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "instruction": ("instruction", "question"),
    "text": ("text",),
}
"""What a row asks, by kind, and the columns that it is looked for in; messages first and text last, as in training."""
_INPUTS = ("input", "context")


def _prompt(value: Any, where: str, columns: Mapping[str, str]) -> Prompt:
    """A prompt from a text or a row.

    Raises:
        BadRowError: it is neither, or has nothing to ask.
    """
    if isinstance(value, str):
        return Prompt(value, value, where)
    if not isinstance(value, dict):
        raise BadRowError(f"it is neither a text nor an object, but {type(value).__name__}")
    record = {name: each for name, each in value.items() if each is not None}
    for kind, names in _ASKED.items():
        asked = next((name for name in (columns.get(kind), *names) if name in record), None)
        if asked is not None:
            return _of_kind(kind, asked, record, where, columns)
    raise BadRowError('it has no "prompt", "text", "messages" or "instruction"')


def _of_kind(kind: str, asked: str, record: dict[str, Any], where: str, columns: Mapping[str, str]) -> Prompt:
    """The prompt that is in one column, checked as rows to train on are."""
    names = {kind: asked}
    for role, known in (("input", _INPUTS), ("tools", ("tools",))):
        name = next((name for name in (columns.get(role), *known) if name in record), None)
        if name is not None and (role == "input") == (kind == "instruction"):
            names[role] = name
    if kind == "text":
        content = maker_of(Layout(kind, names))(record)[1]
        return Prompt(content["text"], content["text"], where)
    if kind == "messages":
        record[asked] = _answered(record[asked])
    else:
        answer = "\0"  # a column of no file
        names["completion" if kind == "prompt" else "output"] = answer
        record[answer] = _ANSWER
    made, content = maker_of(Layout(kind, names))(record)
    if made == "messages":
        messages = content["messages"][:-1]
        tools = {"tools": content["tools"]} if "tools" in content else {}
        return Prompt(messages[-1].get("content") or "", {"messages": messages, **tools}, where)
    if made == "prompt":
        return Prompt(content["prompt"], content["prompt"], where)
    shown = f"{content['instruction']}\n{content['input']}".rstrip()
    return Prompt(shown, {**content, "output": ""}, where)


def _answered(messages: Any) -> Any:
    """The same with an answer at the end, if there is none: as messages, or JSON of them (in a table)."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return messages
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return messages
    last = messages[-1].get("role", messages[-1].get("from"))
    answers = ("assistant", "gpt", "chatgpt", "bing", "bard", "model")
    return messages if last in answers else [*messages, {"role": "assistant", "content": _ANSWER}]
