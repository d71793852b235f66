"""Prompts as tokens, exactly as training has them before the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
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
