"""Several processes that train together: what one finds out, all know."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState

from lorakit.errors import LorakitError

T = TypeVar("T")


def first_says(find: Callable[[], T], *, cpu: bool) -> T:
    """What the first process finds; the others wait for it.

    Args:
        find: asked in the first process alone; what it gives can be pickled.
        cpu: whether the processes train on a CPU, if they have not met yet.

    Raises:
        LorakitError: the first process could not find it; in all of them.
    """
    state = PartialState(cpu=cpu)
    told: list[T | str | None] = [None, None]
    if state.is_main_process:
        try:
            told[0] = find()
        except LorakitError as error:
            told[1] = str(error)
    torch.distributed.broadcast_object_list(told)
    if isinstance(told[1], str):
        raise LorakitError(told[1])
    return told[0]  # type: ignore[return-value]
