"""JavaScript that a network wrote, run by node if it is there: in a world of its own, within bounds, compared by results."""

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from examples.sql_and_javascript import javascript
from examples.sql_and_javascript.pairs import Pair

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

    def __init__(self, seed: int) -> None:
        self.worlds = [json.dumps(world(random.Random(f"{seed} {number}"))) for number in range(WORLDS)]
        self.results: dict[str, list[str | None]] = {}

    def __call__(self, pair: Pair, written: str) -> bool:
        """Equal results in every world; an error is equal to nothing."""
        self.learn([pair.completion, written])
        wanted, got = self.results[pair.completion], self.results[written]
        return None not in wanted and wanted == got

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


def world(draw: random.Random) -> dict[str, Any]:
    """Values of all variables that the grammar knows, drawn anew."""
    letters = "abcdefghiklmnoprstuvw"

    def word() -> str:
        drawn = "".join(draw.choice(letters) for _ in range(draw.randint(1, 8)))
        return draw.choice((drawn, drawn.title(), drawn.upper(), f" {drawn} "))

    def numbers() -> list[int]:
        return [draw.randint(1, 70) for _ in range(draw.randint(6, 10))] + [draw.randint(1, 70)] * 2

    def words() -> list[str]:
        return [word() for _ in range(draw.randint(6, 10))] + [word()] * 2

    def item() -> dict[str, Any]:
        values = {name: draw.choice(javascript.VALUES) for name in javascript.WORD_FIELDS}
        return {**values, **{name: draw.randint(1, 70) for name in javascript.NUMBER_FIELDS}}

    return {
        **{name: numbers() for name in javascript.NUMBERS},
        **{name: words() for name in javascript.WORDS},
        **{name: " ".join(words()) for name in javascript.TEXTS},
        **{name: [item() for _ in range(12)] for name in javascript.OBJECTS},
        **{name: {word(): draw.randint(1, 70) for _ in range(8)} for name in javascript.RECORDS},
    }
