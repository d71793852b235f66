"""Arms timed in turns in one process: what the machine does meanwhile meets all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Arm = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One case of a scenario: seconds of CPU time for each arm, or bytes."""

    case: str
    values: dict[str, float]
    floor: str
    """The arm that the others are measured against."""
    aim: float | None = None
    """The ratio of "lorakit" to the floor that is to be reached."""
    unit: str = "s"
    notes: dict[str, float] = field(default_factory=dict)

    def ratio(self, arm: str) -> float:
        """How many times the floor an arm takes."""
        return self.values[arm] / self.values[self.floor]


def interleaved(arms: Mapping[str, Arm], rounds: int = 9, seconds: float = 0.03) -> dict[str, float]:
    """The least CPU seconds that one call of each arm took, over so many rounds in which the arms take turns.

    Each timing is of as many calls as take about `seconds`, so that the clock's own grain does not count.
    """
    calls = {}
    for name, arm in arms.items():
        arm()  # caches, allocations, lazy work
        begin = time.process_time()
        arm()
        calls[name] = max(1, int(seconds / max(time.process_time() - begin, 1e-7)))
    least = dict.fromkeys(arms, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            order = list(arms) if turn % 2 == 0 else list(reversed(arms))
            for name in order:
                arm, count = arms[name], calls[name]
                begin = time.process_time()
                for _ in range(count):
                    arm()
                least[name] = min(least[name], (time.process_time() - begin) / count)
    finally:
        gc.enable()
    return least
