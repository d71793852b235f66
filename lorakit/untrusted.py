"""Regular expressions that come from a file: matched as their library would, and never for long."""

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from lorakit.errors import LorakitError

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

_WIDE = 2
"""How many parts of a pattern may be repeated without bound: a match takes so many powers of a name's length."""
_LONGEST = 512
"""Characters of a name that such a pattern is tried on."""
_SECONDS = 20.0


class Patterns:
    """PEFT's patterns, each matched against the whole or the end of a name after a dot; all within some seconds."""

    def __init__(self, patterns: Iterable[str], where: str) -> None:
        self.patterns = list(patterns)
        self.where = where
        self.spent = 0.0

    def first(self, name: str) -> str | None:
        """The first pattern that matches, as PEFT takes them; None if none does.

        Raises:
            LorakitError: a pattern is no regular expression, or one that could take for ever.
        """
        start = time.monotonic()
        for pattern in self.patterns:
            problem = _problem(pattern)
            if problem is None and len(name) > _LONGEST:
                problem = f"is tried on a name of {len(name)} characters"
            if problem is not None:
                raise LorakitError(f"{self.where}: the pattern {pattern[:80]!r} {problem}")
            if _matcher(pattern).match(name):
                return pattern
            if self.spent + time.monotonic() - start > _SECONDS:
                raise LorakitError(f"{self.where}: its patterns take more than {_SECONDS:g} seconds to match")
        self.spent += time.monotonic() - start
        return None


@lru_cache(maxsize=4096)
def _matcher(pattern: str) -> re.Pattern[str]:
    """As PEFT matches. What Python has to say of strange brackets is nothing to whoever reads a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(rf"(.*\.)?({pattern})$")


@lru_cache(maxsize=4096)
def _problem(pattern: str) -> str | None:
    """Why a pattern is not to be trusted."""
    if not isinstance(pattern, str):
        return "is no text"
    if len(pattern) > 4096:
        return f"is {len(pattern)} characters long"
    try:
        _matcher(pattern)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"is no regular expression: {error}"
    try:
        wide = _repeats(parsed, False)
    except LorakitError as error:
        return str(error)
    return None if wide <= _WIDE else f"repeats {wide} parts without bound, which could take for ever"


def _repeats(parsed: Any, inside: bool) -> int:
    """How many parts are repeated without bound and match more than one sort of character.

    Raises:
        LorakitError: repetitions, or choices, within a repetition: the time to match can grow exponentially.
    """
    wide = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, item = argument
            many = int(most) > 1
            if many and inside:
                raise LorakitError("repeats what is repeated, which could take for ever")
            wide += _repeats(item, inside or many) + (many and int(most) > 16 and not _narrow(item))
        elif name == "SUBPATTERN":
            wide += _repeats(argument[-1], inside)
        elif name == "BRANCH":
            if inside:
                raise LorakitError("repeats a choice, which could take for ever")
            wide += max(_repeats(branch, inside) for branch in argument[1])
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            raise LorakitError("refers to its own groups or looks around, which no name of a layer needs")
    return wide


def _narrow(item: Any) -> bool:
    """One character, or digits."""
    if len(item) != 1:
        return False
    name, argument = str(item[0][0]), str(item[0][1])
    return name == "LITERAL" or (name == "IN" and argument in ("[(CATEGORY, CATEGORY_DIGIT)]", "[(RANGE, (48, 57))]"))
