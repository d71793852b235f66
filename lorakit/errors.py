"""The one exception that lorakit raises for input it cannot use."""


class LorakitError(ValueError):
    """Something given to lorakit cannot work: the message says what, where, and what to do next.

    It is raised before anything was changed: the model and the files are as they were.
    """
