"""Arms timed in turns in one process: what the machine does meanwhile meets all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ROUNDS = 5
"""At least so many, unless a scenario says otherwise; the least of them counts."""


def _nothing(_: Any = None) -> None:
    pass


@dataclass(frozen=True)
class Apart:
    """An arm of which `run` alone is timed, one call at a time: it is given what `before` made, and so is `after`."""

    run: Callable[[Any], object]
    before: Callable[[], Any] = _nothing
    after: Callable[[Any], object] = _nothing


Arm = Callable[[], object] | Apart


@dataclass(frozen=True)
class Result:
    """One case of a scenario: for each arm the seconds that a call takes, or another unit."""

    case: str
    values: dict[str, float]
    floor: str = "floor"
    """The arm that the others are measured against."""
    aim: float | None = None
    """The ratio of "lorakit" to the floor that is to be reached."""
    unit: str = "s"
    notes: dict[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    against: dict[str, float] = field(default_factory=dict)
    """The ratio of "lorakit" to other arms that is to be reached."""

    def ratio(self, arm: str, to: str | None = None) -> float:
        """How many times the floor, or another arm, an arm takes."""
        return self.values[arm] / self.values[to or self.floor]

    def aims(self) -> dict[str, float]:
        """The ratio of "lorakit" that is to be reached, by the arm that it is to."""
        return ({} if self.aim is None else {self.floor: self.aim}) | self.against

    def short(self) -> dict[str, float]:
        """The ratios that are above their aim."""
        ratios = {arm: self.ratio("lorakit", arm) for arm in self.aims()}
        return {arm: ratio for arm, ratio in ratios.items() if ratio > self.aims()[arm] + 1e-9}


def clock(device: str = "cpu") -> float:
    """Seconds of CPU time; where a GPU does the work, of real time once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    arms: Mapping[str, Arm],
    *,
    rounds: int = ROUNDS,
    seconds: float = 0.03,
    budget: float = 1.5,
    quick: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """The least seconds that one call of each arm took, over rounds in which the arms take turns.

    Each timing is of as many calls as take about `seconds`, so that the clock's own grain does not count. There are at
    least `rounds` rounds, and more as long as `budget` lasts: every arm has as many as every other. The garbage
    collector waits. `quick` is for tests: one call of each.
    """
    counts = {}
    for name, arm in arms.items():
        taken = _seconds(arm, 1, device)  # caches, allocations, lazy work
        if taken < 10 * seconds and not quick:
            taken = _seconds(arm, 1, device)
        counts[name] = 1 if quick else max(1, int(seconds / max(taken, 1e-7)))
    least = dict.fromkeys(arms, float("inf"))
    if not quick:
        gc.collect()
    gc.disable()
    begin, turn = time.process_time(), 0
    try:
        while turn < (1 if quick else rounds) or (time.process_time() - begin < budget and not quick):
            for name in list(arms) if turn % 2 == 0 else reversed(arms):
                least[name] = min(least[name], _seconds(arms[name], counts[name], device) / counts[name])
            turn += 1
    finally:
        gc.enable()
    return least


def _seconds(arm: Arm, count: int, device: str) -> float:
    """How long so many calls take."""
    if isinstance(arm, Apart):
        return sum(_once(arm, device) for _ in range(count))
    begin = clock(device)
    for _ in range(count):
        arm()
    return clock(device) - begin


def _once(arm: Apart, device: str) -> float:
    given = arm.before()
    begin = clock(device)
    arm.run(given)
    taken = clock(device) - begin
    arm.after(given)
    return taken
