"""Checks of hyper-parameters; each error names the argument, its value and what it may be."""

import math
from collections.abc import Sequence
from numbers import Real

from lorakit.errors import LorakitError


def check_integer(name: str, value: object, at_least: int) -> None:
    """An int, not a bool, not below `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise LorakitError(f"{name}={value!r} must be an integer of at least {at_least}")


def is_finite_number(value: object) -> bool:
    """A real number (NumPy's count) that a float can hold; no bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def check_number(
    name: str, value: object, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> None:
    """A finite number within the bounds given."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("at least", at_least), ("below", below))
        if bound is not None
    ]
    if (
        not is_finite_number(value)
        or (above is not None and not value > above)  # type: ignore[operator]
        or (at_least is not None and not value >= at_least)  # type: ignore[operator]
        or (below is not None and not value < below)  # type: ignore[operator]
    ):
        raise LorakitError(f"{name}={value!r} must be a finite number {' and '.join(bounds)}")


def check_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise LorakitError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
