"""The one exception that lorakit raises for input it cannot use, and what callers tell apart of it."""


class LorakitError(ValueError):
    """Something given to lorakit cannot work: the message says what, where, and what to do next.

    It is raised before anything was changed: the model and the files are as they were.
    """


class UnknownFormatError(LorakitError):
    """What is there is of no adapter format that is known; it may be something else, such as a checkpoint."""
