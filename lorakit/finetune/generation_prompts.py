"""Prompts as tokens, exactly as training has them before the answer, and prompts from files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.finetune.base import Base
from lorakit.finetune.data import Row, prompt_of, stops_of

KINDS = ("messages", "prompt", "instruction", "text")


@dataclass(frozen=True)
class Prompter:
    """How prompts become tokens for one base.

    Attributes:
        base: whose tokenizer it is.
        kind: as which kind of row a prompt is taken: messages (through the chat template), prompt (as it is, or in a
            plain template), instruction, or text (as it is).
        template: in place of the tokenizer's chat template, or a plain one.
    """

    base: Base
    kind: str
    template: str | None = None

    def tokens(self, given: "str | Mapping[str, Any] | Row", where: str = "the prompt") -> tuple[int, ...]:
        """The tokens to continue: of a prompt, of a row's content, or of a row.

        Raises:
            LorakitError: the template refuses it.
        """
        return self.asked(self.row(given, where))[0]

    def asked(self, row: Row) -> tuple[tuple[int, ...], str | None]:
        """The tokens to continue of a row, and the answer that is expected, if it has one.

        Raises:
            LorakitError: the template refuses it.
        """
        tokens, expected = prompt_of(row, self.base.tokenizer, self.template)
        if not tokens:
            # An empty text: what begins any text, if the tokenizer has such a token.
            begin = self.base.tokenizer.bos_token_id
            begin = self.base.tokenizer.eos_token_id if begin is None else begin
            tokens = [] if begin is None else [begin]
        return tuple(tokens), expected

    def row(self, given: "str | Mapping[str, Any] | Row", where: str = "the prompt") -> Row:
        """A prompt as a row of this kind."""
        if isinstance(given, Row):
            return given
        if isinstance(given, str):
            _check_text(given, where)
        if isinstance(given, Mapping):
            return Row(where, next(kind for kind in ("messages", "instruction") if kind in given), given)
        content: dict[str, Any] = {self.kind: given}
        if self.kind == "messages":
            content = {"messages": [{"role": "user", "content": given}]}
        return Row(where, self.kind, content)

    def ends(self) -> frozenset[int]:
        """The tokens that end an answer in training, such as <|im_end|>."""
        return frozenset(stops_of(self.kind, self.base.tokenizer, self.template))


def _check_text(text: str, where: str) -> None:
    """Bytes that a shell gives and that are no text come as halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise LorakitError(f"{where}: it has half a character ({half}) at {error.start + 1}, and is no text") from None


def prompter_of(base: Base, *, kind: str | None = None, template: str | None = None, raw: bool = False) -> Prompter:
    """How a base is asked: through its chat template if it has one, else with the prompt as it is.

    Args:
        base: the base.
        kind: of which kind the rows were that an adapter was trained on, if that is known.
        template: as in training: a name, a file, or the template itself.
        raw: take prompts as plain text, whatever template there is.

    Raises:
        LorakitError: the template is none, or not for this kind.
    """
    from lorakit.finetune.data.templates import template_of

    if kind is not None and kind not in KINDS:
        raise LorakitError(f"{kind!r} is no kind of rows: {', '.join(KINDS)} are")
    if raw or kind == "text":
        return Prompter(base, "text")
    found = template_of(template, base.tokenizer)
    if kind is None:
        chat = base.tokenizer.chat_template is not None if found is None else found.chat
        kind = "messages" if chat else "prompt"
    return Prompter(base, kind, template)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how it is shown."""

    text: str
    content: str | Mapping[str, Any]
    where: str


def read_prompts(lines: Sequence[str], source: str, *, jsonl: bool) -> list[Prompt]:
    """Prompts, one a line.

    Args:
        lines: of a file.
        source: its name, for messages.
        jsonl: lines are JSON: a text, or an object with "prompt", "text", "messages", or "instruction" and "input";
            answers in it are left out.

    Raises:
        LorakitError: lines that are none, all of which are named; or there is no prompt.
    """
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        text = line.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else line.rstrip("\r\n")
        if not text.strip():
            continue
        where = f"{source}:{number}"
        try:
            found.append(_prompt(json.loads(text), where) if jsonl else Prompt(text, text, where))
        except (ValueError, RecursionError) as error:
            bad.append(f"{where}: {error}")
    if bad:
        raise LorakitError("\n  ".join([f"{source} has lines that are no prompts:", *bad]))
    if not found:
        raise LorakitError(f"{source} holds no prompt")
    return found


def prompts_at(path: Path) -> list[Prompt]:
    """The prompts in a text file, one a line, or in a .jsonl file.

    Raises:
        LorakitError: it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 ({error})"
        raise LorakitError(f"cannot read the prompts in {path}: {reason}") from None
    return read_prompts(text.split("\n"), str(path), jsonl=path.suffix.lower() in (".jsonl", ".ndjson"))


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(value, value, where)
    if not isinstance(value, dict):
        raise ValueError(f"it is neither a text nor an object, but {type(value).__name__}")
    for name in ("prompt", "text", "question"):
        if isinstance(value.get(name), str):
            return Prompt(value[name], value[name], where)
    if isinstance(value.get("instruction"), str):
        more = value.get("input") or ""
        if not isinstance(more, str):
            raise ValueError('"input" must be a text')
        shown = f"{value['instruction']}\n{more}".rstrip()
        return Prompt(shown, {"instruction": value["instruction"], "input": more, "output": ""}, where)
    messages = value.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if asked:
            return Prompt(asked[-1]["content"], {"messages": asked}, where)
    raise ValueError('it has no "prompt", "text", "messages" or "instruction"')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
