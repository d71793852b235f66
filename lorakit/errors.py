"""The one exception that lorakit raises for input it cannot use, and what callers tell apart of it."""

_MOST = 15_000


class LorakitError(ValueError):
    """Something given to lorakit cannot work: the message says what, where, and what to do next.

    It is raised before anything was changed: the model and the files are as they were. What a file says is anybody's:
    control characters, which would steer a terminal, are written out, and a text without end is cut.
    """

    def __init__(self, message: str = "") -> None:
        text = message if len(message) <= _MOST else f"{message[:_MOST]}… and {len(message) - _MOST} more characters"
        super().__init__("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


class UnknownFormatError(LorakitError):
    """What is there is of no adapter format that is known; it may be something else, such as a checkpoint."""
