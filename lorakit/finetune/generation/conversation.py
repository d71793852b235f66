"""A chat: what was said, as tokens that fit in the model's context."""

from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.finetune.generation.generate import context_of
from lorakit.finetune.generation.prompts import Prompter


class Ready(NamedTuple):
    """What an answer is generated from."""

    tokens: tuple[int, ...]
    dropped: int
    """Turns that no longer fitted, and are forgotten."""


class Conversation:
    """Turns so far, if the base has a chat template; without one each line is continued by itself.

    Args:
        prompter: how text becomes tokens; another may be put in its place, which sees the same turns.
        room: tokens that are kept free for an answer, or half of the context if that is less.
    """

    def __init__(self, prompter: Prompter, room: int) -> None:
        self.prompter = prompter
        context = context_of(prompter.base.model)
        self._most = None if context is None else context - max(1, min(room, context // 2))
        self._turns: list[dict[str, str]] = []
        self.system: str | None = None
        self.forgotten = 0
        """Turns that no longer fitted, since the beginning."""

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are seen."""
        return self.prompter.kind == "messages"

    @property
    def turns(self) -> int:
        """How many questions are remembered."""
        return sum(turn["role"] == "user" for turn in self._turns)

    def reset(self) -> None:
        """Forget what was said, but for the system's message."""
        self._turns.clear()
        self.forgotten = 0

    def asked(self, text: str) -> Ready:
        """Add a question; the oldest turns that no longer fit go.

        Raises:
            LorakitError: the question alone does not fit, or the template refuses it; it is not remembered.
        """
        if not self.remembers:
            return Ready(self._fitting(self.prompter.tokens(text)), 0)
        turns, dropped = [*self._turns, {"role": "user", "content": text}], 0
        while True:
            tokens = self._tokens(turns)
            if self._most is None or len(tokens) <= self._most or len(turns) == 1:
                break
            dropped += 1
            turns = turns[2:]
        self._fitting(tokens)
        self._turns = turns
        self.forgotten += dropped
        return Ready(tokens, dropped)

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        if self.remembers:
            self._turns.append({"role": "assistant", "content": text})

    def unasked(self) -> None:
        """Take the last question back, as it was not answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def _tokens(self, turns: list[dict[str, str]]) -> tuple[int, ...]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.prompter.tokens({"messages": [*system, *turns]})

    def _fitting(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if self._most is not None and len(tokens) > self._most:
            raise LorakitError(f"that is {len(tokens)} tokens, and no more than {self._most} leave room for an answer")
        return tokens
