"""Chats through a template: the text of each, and which of it the assistant says.

What is trained on is what the model would generate: an assistant's turn after the text that asks for it, with the token
that ends it. The template's own {% generation %} marks say so; without these it is found by rendering the messages
up to each turn, and checked to be exactly the beginning of the whole.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.errors import LorakitError
from lorakit.finetune.data.contents import BadRowError
from lorakit.finetune.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TAIL = 20
_DATE = "26 Jul 2024"
"""What Llama's templates take for today where no date is given: the same tokens on every day that a run is resumed."""


class Turn(NamedTuple):
    """A chat as text: pieces with whether they are trained on, and at which of them the last answer begins."""

    pieces: tuple[tuple[str, bool], ...]
    answer: int
    end: bool
    """Whether nothing in the text ends the last answer."""
    expected: str | None


class Chat:
    """A tokenizer's chat template, or another in its place."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template | None) -> None:
        self.own = template is not None and template.own
        self._tokenizer = tokenizer
        self._text = None if template is None else template.text
        try:
            found = tokenizer.get_chat_template(self._text)
        except Exception as error:
            raise LorakitError(f"the tokenizer's chat template cannot be used: {error}") from None
        self._compared = False
        self._marked = _MARK.search(found) is not None
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        # What ends a turn is among these.
        self._ends = tuple(sorted({t for t in (*added, *tokenizer.all_special_tokens) if t.strip()}))

    def turns(self, messages: Messages, first: int, tools: list[Any] | None) -> list[Turn]:
        """A chat as one text; or one for each answer, where the template writes earlier ones otherwise later on.

        Args:
            messages: {"role", "content"}; without an answer at the end the text ends where one is asked for.
            first: the first message that may be trained on.
            tools: what the template gets as tools.

        Raises:
            BadRowError: the template refuses them.
            LorakitError: the template is no Jinja, or it is not to be told what the assistant says.
        """
        answered = messages[-1]["role"] == "assistant"
        whole, marks = self._whole(messages, tools, ask=not answered)
        trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        _check_all_there(messages, trained, whole)
        if self._marked:
            spans = self._marked_spans(messages, trained, whole, marks)
        else:
            found = self._spans(messages, tools, trained, whole)
            if found is None:
                return [self._one(messages[: i + 1], tools) for i in trained] + (
                    [] if answered else [self._turn(whole, [], None)]
                )
            spans = found
        return [self._turn(whole, spans, self._asked(messages, tools, whole, spans) if answered else None)]

    def _one(self, messages: Messages, tools: list[Any] | None) -> Turn:
        """The last answer alone, after what it is generated from."""
        whole = self._render(messages, tools)
        spans = self._spans(messages, tools, [len(messages) - 1], whole)
        if spans is None:  # the whole is its own beginning: there is but nothing after it
            raise BadRowError("the chat template writes nothing for the last answer")
        return self._turn(whole, spans, spans[-1][0])

    def _spans(
        self, messages: Messages, tools: list[Any] | None, trained: list[int], whole: str
    ) -> list[tuple[int, int]] | None:
        """Where each answer begins and ends in the whole; None if the whole has them otherwise than they were said."""
        spans = []
        for i in trained:
            asked = self._render(messages[:i], tools, ask=True)
            said = whole if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
            if not said.startswith(asked):
                raise LorakitError(_unlike(asked, said))
            if i < len(messages) - 1 and not whole.startswith(self._ended(said)):
                # Some templates end a text with the tokenizer's own token, after that of the turn.
                said = said.removesuffix(self._tokenizer.eos_token or "")
            end = len(self._ended(said))
            if end <= len(asked) or not whole.startswith(said[:end]):
                return None
            spans.append((len(asked), end))
        return spans

    def _ended(self, said: str) -> str:
        """A text up to the token that ends its last turn, without the line end that templates put after it."""
        bare = said.rstrip()
        return bare if bare.endswith(self._ends) else said

    def _whole(self, messages: Messages, tools: list[Any] | None, ask: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of all messages, and where the template's marks in it begin and end."""
        if not self._marked:
            return self._render(messages, tools, ask), []
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, found = render(
                conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(self._text),
                return_assistant_tokens_mask=True,
                add_generation_prompt=ask,
                **{**self._tokenizer.special_tokens_map, "date_string": _DATE},
            )
        except Exception as error:
            raise _refused(error) from None
        if not self._compared and texts[0] != self._render(messages, tools, ask):
            raise LorakitError("the chat template writes another text each time: what to train on cannot be told")
        self._compared = True
        return texts[0], found[0]

    def _marked_spans(
        self, messages: Messages, trained: list[int], whole: str, marks: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """What the template marks of the messages to train on, with the token that ends each."""
        spans = [self._to_its_end(whole, start, end) for start, end in marks if end > start]
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(trained) < len(said):
            if len(spans) != len(said):
                raise LorakitError(
                    "the chat template's {% generation %} marks are not one for each answer, so those to train on "
                    "cannot be told from the others: give rows as messages, or another template"
                )
            spans = [span for i, span in zip(said, spans, strict=True) if i in trained]
        if not spans and trained:
            raise BadRowError("the chat template marks nothing in it as said by the assistant")
        return spans

    def _to_its_end(self, whole: str, start: int, end: int) -> tuple[int, int]:
        """A marked part with the token that ends a turn, also where the marks leave it out: the model is to stop."""
        said = whole[start:end]
        if self._ended(said).endswith(self._ends):
            return start, start + len(self._ended(said))
        close = next((token for token in self._ends if self._ended(whole).endswith(token)), None)
        return start, end + len(close) if close is not None and whole.startswith(close, end) else end

    def _asked(self, messages: Messages, tools: list[Any] | None, whole: str, spans: list[tuple[int, int]]) -> int:
        """How far the whole is what the last answer is generated from."""
        if not self._marked:
            return spans[-1][0]
        asked = self._render(messages[:-1], tools, ask=True)
        return len(asked) if whole.startswith(asked) else spans[-1][0]

    def _turn(self, whole: str, spans: list[tuple[int, int]], asked: int | None) -> Turn:
        """The whole in pieces, parted where a span begins or ends and where the last answer is asked for."""
        last = spans[-1][1] if spans else 0
        said = whole if asked is None else self._ended(whole)
        cuts = sorted({0, len(whole), *(edge for span in spans for edge in span), *([] if asked is None else [asked])})
        pieces, answer = [], 0
        for start, end in pairwise(cuts):
            answer += asked is None or end <= asked
            pieces.append((whole[start:end], any(a <= start and end <= b for a, b in spans)))
        expected = None if asked is None else whole[asked : max(last, asked)]
        for token in self._ends if expected else ():
            expected = expected.replace(token, "") if expected else expected
        # Where the last answer has no token of the template at its end, the tokenizer's own goes there.
        end_of_text = asked is not None and not said.endswith(self._ends)
        return Turn(tuple(pieces), answer, end_of_text, expected)

    def _render(self, messages: Messages, tools: list[Any] | None, ask: bool = False) -> str:
        try:
            apply: Any = self._tokenizer.apply_chat_template
            text = apply(
                list(messages),
                tools=tools,
                chat_template=self._text,
                add_generation_prompt=ask,
                tokenize=False,
                date_string=_DATE,
            )
        except Exception as error:
            raise _refused(error) from None
        return str(text)


def _check_all_there(messages: Messages, trained: list[int], whole: str) -> None:
    """Whether what is asked last and what is to be learnt is in the text: templates for images leave plain text out.

    Raises:
        BadRowError: it is not.
    """
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"][-1:]
    for i in (*asked, *trained):
        content = messages[i].get("content") or ""
        # Its end: templates cut thoughts from the beginning of answers.
        if content.rpartition("</think>")[2].strip()[-_TAIL:] not in whole:
            raise BadRowError(f"the chat template leaves out what message {i + 1} says")


def _refused(error: Exception) -> Exception:
    """What to raise for whatever a template's code ran into: it is the row's matter, unless no row could pass."""
    from jinja2 import TemplateSyntaxError

    line = (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
    if isinstance(error, (TemplateSyntaxError, ImportError)):
        return LorakitError(f"the chat template is no Jinja that can be used: {line}")
    return BadRowError(f"the chat template refuses it: {line}")


def _unlike(asked: str, said: str) -> str:
    """That a template asks for an answer otherwise than it writes one."""
    same = next((i for i, (a, b) in enumerate(zip(asked, said, strict=False)) if a != b), min(len(asked), len(said)))
    return (
        f"the chat template asks for an answer with {asked[max(0, same - 20) :][-60:]!r}, and writes one that is given "
        f"as {said[max(0, same - 20) :][:60]!r}: it would be trained after another text than it is generated from. "
        "Give a template with {% generation %} marks, or one that asks as it writes, as template"
    )
