"""Rows as pieces of text, of which it is known whether they are trained on; still no tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.finetune.data.chat import Chat, Turn
from lorakit.finetune.data.rows import Row
from lorakit.finetune.data.templates import BUILT_IN, INSTRUCTION, Template, filled, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Draft:
    """One example as text in pieces, no token of which will reach over into the next."""

    pieces: tuple[tuple[str, bool], ...]
    """Each with whether it is trained on."""
    answer: int
    """The piece at which the last answer begins: those before it are the prompt that it is generated from."""
    start: bool
    """Whether the tokens come first that the tokenizer itself begins a text with."""
    end: bool
    """Whether the token for the end of a text comes last."""
    expected: str | None
    """The last answer as text, without what ends it."""


Recipe = Callable[[Row], list[Draft]]
"""The examples of one row: several only where a chat template asks for it."""


def recipe_of(kind: str, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> Recipe:
    """How rows of a kind become text.

    Raises:
        LorakitError: messages have no chat template, or the template is not for this kind.
    """
    found = template_of(template, tokenizer)
    if kind == "text":
        if found is not None:
            raise LorakitError("rows of text are trained on as they are: leave the template away")
        return _text
    own = tokenizer.chat_template is not None
    if found is None and (kind == "messages" or (kind == "instruction" and own)):
        if not own:
            raise LorakitError(
                "the rows are messages, and the tokenizer has no chat template: name one with template, such as "
                f"{' or '.join(repr(name) for name in BUILT_IN if name in ('chatml', 'simple'))}, or a file with one"
            )
        return _chat(Chat(tokenizer, None))
    if found is not None and found.chat:
        return _chat(Chat(tokenizer, found))
    if kind == "messages":
        raise LorakitError("the rows are messages, and the template is no chat template: name one, such as 'chatml'")
    if found is None and kind == "instruction":
        found = Template(INSTRUCTION, chat=False)
    return _plain(found)


def _text(row: Row) -> list[Draft]:
    return [Draft(((row.content["text"], True),), 1, True, True, None)]


def _plain(template: Template | None) -> Recipe:
    """Prompt and completion put one after the other, or into a plain template."""

    def drafts(row: Row) -> list[Draft]:
        prompt, instruction, more, completion = _parts(row)
        head, tail = (prompt, "") if template is None else filled(template.text, prompt, instruction, more)
        if not completion:
            return [Draft(((head, False),), 1, True, False, None)]
        return [Draft(((head, False), (completion + tail, True)), 1, True, True, completion)]

    return drafts


def _parts(row: Row) -> tuple[str, str, str, str]:
    """Prompt, instruction, input, completion."""
    content = row.content
    if row.kind == "prompt":
        return content["prompt"], content["prompt"], "", content.get("completion") or ""
    more = content.get("input") or ""
    prompt = f"{content['instruction']}\n\n{more}" if more else content["instruction"]
    return prompt, content["instruction"], more, content.get("output") or ""


def _chat(chat: Chat) -> Recipe:
    """Turns of a chat, or prompt and completion as such."""

    def drafts(row: Row) -> list[Draft]:
        content = row.content
        if row.kind == "messages":
            turns = chat.turns(content["messages"], content.get("first", 0), content.get("tools"))
        else:
            prompt, _, _, completion = _parts(row)
            turns = chat.turns(_messages(prompt, completion), 0, None)
        return [_draft(turn, chat) for turn in turns]

    return drafts


def _messages(prompt: str, completion: str) -> list[Mapping[str, Any]]:
    answer = [{"role": "assistant", "content": completion}] if completion else []
    return [{"role": "user", "content": prompt}, *answer]


def _draft(turn: Turn, chat: Chat) -> Draft:
    return Draft(turn.pieces, turn.answer, chat.own, turn.end, turn.expected)
