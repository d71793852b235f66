"""One line that says how a run goes: rewritten on a terminal, printed now and then elsewhere."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from lorakit.tables import size


def duration(seconds: float) -> str:
    """3:07 or 2:05:09."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(facts: Mapping[str, Any]) -> str:
    """Step 120/900  loss 1.234  val 1.301  lr 1.9e-04  12,300 tok/s  2:31 left  1.2 GB."""
    parts = [f"step {facts['step']}/{facts['steps']}"]
    for name, label, form in (("loss", "loss", ".4f"), ("eval_loss", "val", ".4f"), ("learning_rate", "lr", ".1e")):
        if facts.get(name) is not None:
            parts.append(f"{label} {facts[name]:{form}}")
    if facts.get("tokens_per_second"):
        parts.append(f"{facts['tokens_per_second']:,.0f} tok/s")
    if facts.get("left") is not None:
        parts.append(f"{duration(facts['left'])} left")
    if facts.get("memory"):
        parts.append(size(facts["memory"]))
    return "  ".join(parts)


class Line:
    """The line. What is said in between stands above it."""

    def __init__(self, out: TextIO | None = None, quiet: bool = False) -> None:
        self.out = sys.stdout if out is None else out
        self.live = not quiet and self.out.isatty()
        self.quiet = quiet
        self._shown = ""

    def update(self, text: str) -> None:
        """On a terminal: the line as it is now."""
        if self.live:
            self._shown = text[: max(20, shutil.get_terminal_size().columns - 1)]
            self.out.write(f"\r\x1b[K{self._shown}")
            self.out.flush()

    def note(self, text: str) -> None:
        """Elsewhere: a line of its own; a terminal shows it anyway."""
        if self.live:
            self.update(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        self.out.write(f"\r\x1b[K{text}\n{self._shown}" if self.live else f"{text}\n")
        self.out.flush()

    def end(self) -> None:
        """The line as it stands stays."""
        if self.live and self._shown:
            self.out.write("\n")
            self.out.flush()
        self._shown = ""
