"""Checks of hyper-parameters; each error names the argument, its value and what it may be."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from lorakit.errors import LorakitError


def checked_integer(name: str, value: object, at_least: int, at_most: int) -> int:
    """An integer (NumPy's count, a bool does not) within the bounds, as Python's own int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not at_least <= int(value) <= at_most:
        raise LorakitError(f"{name}={value!r} must be an integer of at least {at_least} and at most {at_most}")
    return int(value)


def is_finite_number(value: object) -> bool:
    """A real number (NumPy's count) that a float can hold; no bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def checked_number(
    name: str, value: object, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> float:
    """A finite number within the bounds given, as Python's own int or float."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("at least", at_least), ("below", below))
        if bound is not None
    ]
    number = float(value) if is_finite_number(value) else math.nan  # type: ignore[arg-type]
    if not (
        math.isfinite(number)
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
    ):
        raise LorakitError(f"{name}={value!r} must be a finite number {' and '.join(bounds)}")
    return int(value) if isinstance(value, Integral) else number


def check_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise LorakitError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
