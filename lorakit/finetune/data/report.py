"""What became of rows on the way to tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

_NAMED = 5


@dataclass(frozen=True)
class Report:
    """Numbers of one `encode`; as text, some readable lines."""

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest example before anything was cut."""
    max_length: int
    truncated: int
    """Examples that were cut."""
    lost_tokens: int
    """Tokens cut off in all."""
    dropped: Mapping[str, tuple[str, ...]]
    """The places of examples that were left out, by reason."""
    parted: int
    """Chats that became one example for each answer."""
    touching: int
    """Rows whose prompt and completion meet without white space between them."""
    unknown: int
    """Tokens that stand for what the tokenizer does not know."""
    ended: bool
    """Whether the tokenizer has a token that ends a text."""

    def __str__(self) -> str:
        lines = [
            f"{_counted(self.rows, 'row')}, {_counted(self.examples, 'example')}, {_counted(self.tokens, 'token')}, "
            f"of which {self.trained_tokens:,} are trained on; the longest has {self.longest:,}"
        ]
        if self.truncated:
            lines.append(
                f"cut to {self.max_length:,} tokens: {_counted(self.truncated, 'example')}, which lost "
                f"{_counted(self.lost_tokens, 'token')}"
            )
        for reason, places in self.dropped.items():
            more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
            lines.append(f"left out, {reason}: {len(places):,} ({', '.join(places[:_NAMED])}{more})")
        if self.parted:
            lines.append(
                f"{_counted(self.parted, 'chat')} became one example for each answer, as the chat template writes "
                "earlier turns otherwise once others follow"
            )
        if 2 * self.touching > self.rows:
            lines.append(
                f"{_counted(self.touching, 'prompt')} and completions meet without white space: put a space or a line "
                "end at the beginning of completions, or set a template, if they are not meant to"
            )
        if self.unknown:
            lines.append(f"{_counted(self.unknown, 'token')} stand for what the tokenizer does not know")
        if not self.ended:
            lines.append("the tokenizer has no token that ends a text: answers are trained without an end")
        return "\n".join(lines)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"
