"""Stopping between two steps, with a checkpoint, when somebody asks for it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch


class Stopper:
    """Inside, the first Ctrl-C or SIGTERM is noted, and the next one interrupts at once.

    `wanted` is asked after each step; all processes that train together get the same answer.
    """

    def __init__(self) -> None:
        self.noted: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted is not None:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether to stop."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.noted is not None
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(float(self.noted is not None), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
