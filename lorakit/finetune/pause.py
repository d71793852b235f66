"""Python's collector of cycles, paused where millions of objects are made and none of them is in one."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside: it looks at all objects again and again, for half of the time that reading takes.

    Importing a large library is such a place too: a second of four.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
