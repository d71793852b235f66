"""JavaScript that a network wrote, run by node if it is there: within bounds, and compared by its results."""

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

WORLDS = 4
"""Sets of values for the variables: code must give what the gold code gives in each."""
_SECONDS = 60.0
_MOST = 2000
"""Characters of code."""


@cache
def node() -> str | None:
    """Where node is, or nothing."""
    return shutil.which("node")


class Check:
    """Whether code gives what a pair's gold code gives; results are kept, as the same code comes again."""

    def __init__(self, world: Callable[[random.Random], Any], seed: int) -> None:
        self.worlds = [json.dumps(world(random.Random(f"{seed} {number}"))) for number in range(WORLDS)]
        self.results: dict[str, list[str | None]] = {}

    def __call__(self, wanted: str, written: str) -> bool:
        """Equal results in every world; an error is equal to nothing."""
        self.learn([wanted, written])
        return None not in self.results[wanted] and self.results[wanted] == self.results[written]

    def learn(self, codes: Sequence[str]) -> None:
        """Run what is not known yet, all in one process."""
        new = [code for code in dict.fromkeys(codes) if code not in self.results]
        self.results.update(zip(new, results(new, self.worlds), strict=True))


def results(codes: Sequence[str], worlds: Sequence[str]) -> list[list[str | None]]:
    """What each code gives in each world, as JSON; nothing where it fails, takes too long or takes too much memory.

    Code that takes node down with it costs that code's results alone.
    """
    nothing: list[str | None] = [None] * len(worlds)
    found: list[list[str | None]] = []
    while len(found) < len(codes):
        lines = _answers(codes[len(found) :], worlds)
        found += lines
        if len(found) < len(codes):
            found.append(nothing)
    return found


def _answers(codes: Sequence[str], worlds: Sequence[str]) -> list[list[str | None]]:
    """One process's answers, which may be fewer than were asked for."""
    executable = node()
    assert executable is not None
    asked = [{"code": code if len(code) <= _MOST else "", "worlds": list(worlds)} for code in codes]
    script = Path(__file__).with_name("evaluate.js")
    with tempfile.TemporaryDirectory() as nowhere:
        command = [executable, "--max-old-space-size=128", "--disable-proto=delete", str(script)]
        process = subprocess.Popen(
            command, cwd=nowhere, env={"PATH": os.defpath}, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            said, _ = process.communicate("".join(f"{json.dumps(each)}\n" for each in asked), timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    return [json.loads(line) for line in said.split("\n")[:-1]]
