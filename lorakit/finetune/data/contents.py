"""What one row must hold for its kind: text that is there and is text, and messages that end with an answer."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.finetune.data.columns import Layout

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""How ShareGPT's files and those after them name who speaks."""


class BadRowError(Exception):
    """Why a row cannot be used; caught where rows are collected, so that all are named at once."""


def maker_of(layout: Layout) -> Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]:
    """A function from a record of a file to the kind and content of its row, which raises `BadRowError`."""
    columns = dict(layout.columns)
    if layout.kind == "messages":
        return lambda record: ("messages", _chat(record, columns))
    if layout.kind == "prompt":
        return lambda record: _prompt(record, columns)
    if layout.kind == "instruction":
        return lambda record: ("instruction", _instruction(record, columns))
    name = columns["text"]
    return lambda record: ("text", {"text": _text(record, name)})


def _text(record: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """The text in a column."""
    try:
        value = record[name]
    except KeyError:
        raise BadRowError(f"has no {name!r}") from None
    return _checked(value, repr(name), empty)


def _checked(value: Any, what: str, empty: bool = False) -> str:
    if type(value) is not str:
        raise BadRowError(f"{what} is {_kind(value)}, not text")
    if not (value and not value.isspace()) and not empty:
        raise BadRowError(f"{what} is empty" if not value else f"{what} is nothing but white space")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode_escape").decode()
            raise BadRowError(f"{what} has half a character ({half}) at position {error.start}") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return "NaN" if value != value else f"the number {str(value)[:40]}"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"of type {type(value).__name__}"


def _instruction(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found = {"instruction": _text(record, columns["instruction"]), "input": ""}
    name = columns.get("input")
    if name is not None and record.get(name) is not None:  # absent or null: this one needs none
        found["input"] = _text(record, name, empty=True)
        if found["input"].isspace():
            found["input"] = ""
    return {**found, "output": _text(record, columns["output"])}


def _prompt(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Text and text; or messages and messages, whose answers alone are trained on."""
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(record.get(prompt), (list, tuple)):
        asked = _messages(record[prompt], repr(prompt))
        answer = record.get(completion)
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        elif completion not in record:
            raise BadRowError(f"has no {completion!r}")
        found = [*asked, *_messages(answer, repr(completion))]
        return "messages", _as_chat(found, record, columns, first=len(asked))
    found_prompt = _text(record, prompt, empty=True)
    return "prompt", {"prompt": found_prompt, "completion": _text(record, completion)}


def _chat(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    name = columns["messages"]
    if name not in record:
        raise BadRowError(f"has no {name!r}")
    return _as_chat(_messages(record[name], repr(name)), record, columns)


def _as_chat(
    messages: list[dict[str, Any]], record: Mapping[str, Any], columns: Mapping[str, str], first: int = 0
) -> dict[str, Any]:
    """Content of the kind messages.

    Raises:
        BadRowError: nothing in it can be trained on, or the tools are no list.
    """
    if messages[-1]["role"] != "assistant":
        raise BadRowError(f"ends with the {messages[-1]['role']}: the last message must be the assistant's")
    if messages[0]["role"] == "assistant":
        raise BadRowError("begins with the assistant: nothing comes before its answer")
    found: dict[str, Any] = {"messages": messages, **({"first": first} if first else {})}
    name = columns.get("tools")
    tools = record.get(name) if name is not None else None
    if tools:
        tools = _from_json(tools) if isinstance(tools, str) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadRowError(f"{name!r} is {_kind(tools)}, not a list of objects")
        found["tools"] = tools
    return found


def _from_json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Messages as {"role", "content"}, from these or from {"from", "value"}, or from JSON of either (in a CSV)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value)
    if not isinstance(value, (list, tuple)):
        raise BadRowError(f"{what} is {_kind(value)}, not a list of messages")
    if not value:
        raise BadRowError(f"{what} is an empty list")
    return [
        message if _is_plain(message) else _message(message, f"message {i} of {what}")
        for i, message in enumerate(value, 1)
    ]


def _is_plain(message: Any) -> bool:
    """Whether it is beyond doubt what it should be, as nearly all are: a file may have a million."""
    if type(message) is not dict or len(message) != 2:
        return False
    role, content = message.get("role"), message.get("content")
    return type(content) is str and content.isascii() and content[:1] > " " and type(role) is str and role in ROLES


def _message(given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise BadRowError(f"{what} is {_kind(given)}, not an object with role and content")
    # Columnar files fill in null where other messages have a key.
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "role" not in message:
        raise BadRowError(f"{what} has no role (its keys: {', '.join(map(repr, list(given)[:9])) or 'none'})")
    role = message["role"]
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRowError(f"{what} has the role {role!r:.60}; known are {', '.join(ROLES)}")
    if message.get("weight", 1) != 1:
        raise BadRowError(f"{what} has a weight, which is not known here: leave the row out, or the key")
    calls = role == "assistant" and message.get("tool_calls")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = _joined(content, what)
    if content is None and not calls:
        raise BadRowError(f"{what} has no content")
    if content is not None:
        # An answer is what is learnt: it has to be there; a system prompt or a tool's result may be empty.
        content = _checked(content, f"the content of {what}", empty=role != "assistant" or bool(calls))
        message["content"] = content
    return {**message, "role": role}


def _joined(parts: "list[Any] | tuple[Any, ...]", what: str) -> str:
    """Content in parts, [{"type": "text", "text"}]: what is no text is nothing for a language model."""
    for part in parts:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRowError(f"the content of {what} has a part that is no text ({kind!s:.40})")
    return "".join(part["text"] for part in parts)
