"""The text of tokens as they come, one after the other."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8
"""Tokens before the first that are decoded with it: whether a word begins with a space depends on what is before."""
_MOST_HELD = 16
"""Tokens that are held back at most because they end within a character: more are no character."""


class TextStream:
    """What a model writes, piece by piece; the pieces together are the text.

    A character of several tokens comes whole. What may be the beginning of a stop string is held back until it is none.

    Attributes:
        text: all that is certain so far, without the stop string.
        stopped: whether a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = list(prompt[-_CONTEXT:])
        self._before, self._read = 0, len(self._tokens)
        self._known = ""  # what is known before it, held back or not
        self._said = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._known[: self._said]

    def add(self, token: int) -> str:
        """What the token adds to what is certain; "" after a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        self._decode(last=False)
        return self._say(last=False)

    def end(self) -> str:
        """What was held back, as nothing more comes."""
        if self.stopped:
            return ""
        self._decode(last=True)
        return self._say(last=True)

    def _decode(self, last: bool) -> None:
        old = self._text_of(self._tokens[self._before : self._read])
        new = self._text_of(self._tokens[self._before :])
        whole = last or not new.endswith("\ufffd") or len(self._tokens) - self._read > _MOST_HELD
        if not whole or len(new) <= len(old):
            return
        shared = len(old) if new.startswith(old) else next(i for i in range(len(new)) if new[i] != old[i : i + 1])
        self._known += new[shared:]
        self._before, self._read = self._read, len(self._tokens)

    def _text_of(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _say(self, last: bool) -> str:
        ends = [place for stop in self._stops if (place := self._known.find(stop, self._said)) >= 0]
        if ends:
            self.stopped = True
            self._known = self._known[: min(ends)]
        held = 0 if last or self.stopped else _begun(self._known[self._said :], self._stops)
        piece = self._known[self._said : len(self._known) - held]
        self._said += len(piece)
        return piece


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
