"""The one exception that lorakit raises for input it cannot use, and texts of others made fit for a terminal."""

_LINES, _LINE, _ALL = 60, 2000, 20_000
"""What a person reads of an error; a damaged file may have a million things wrong with it, or names of megabytes."""


class LorakitError(ValueError):
    """Something given to lorakit cannot work: the message says what, where, and what to do next.

    It is raised before anything was changed: the model and the files are as they were. What a file says is anybody's:
    control characters, which would steer a terminal, are written out, and a text without end is cut.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_bounded(message))


class UnknownFormatError(LorakitError):
    """What is there is of no adapter format that is known; it may be something else, such as a checkpoint."""


def printable(text: str, keep: str = "") -> str:
    """The text with control characters written out, but for those to keep: a name in a file acts on no terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _bounded(message: str) -> str:
    """The message without control characters, its first lines if it has many, and the ends of a line that is long."""
    if len(message) <= _LINE and message.isprintable():
        return message
    lines = message.split("\n", _LINES)
    more = lines.pop().count("\n") + 1 if len(lines) > _LINES else 0
    half = min(_LINE, _ALL // len(lines)) // 2
    cut = (f"{line[:half]} […] {line[-half:]}" if len(line) > _LINE else line for line in lines)
    text = "\n".join([*cut, *([f"  … and {more} more"] if more else [])])
    return printable(text, keep="\n\t")
