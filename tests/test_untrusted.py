"""Patterns from files: as PEFT matches them, and within bounded time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.untrusted import Patterns

PLAIN = [
    "q_proj",
    "^model\\.layers\\.0\\.q_proj",
    ".*\\.layers\\.\\d+\\.mlp\\.up",
    "(q|k|v)_proj",
    "layers\\.[0-9]+\\.a",
    "a.c",
]
NAMES = ["q_proj", "model.layers.0.q_proj", "x.layers.12.mlp.up", "m.k_proj", "xq_proj", "layers.7.a", "b.abc", "ab.c"]


@pytest.mark.parametrize("pattern", PLAIN)
@pytest.mark.parametrize("name", NAMES)
def test_they_match_as_peft_matches(pattern, name):
    assert (Patterns([pattern], "here").first(name) is not None) == bool(re.match(rf"(.*\.)?({pattern})$", name))


def test_the_first_that_matches_counts():
    assert Patterns(["x", "q_proj", "a.q_proj"], "here").first("a.q_proj") == "q_proj"
    assert Patterns([], "here").first("a") is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*", "(.*)*x", ".*.*.*.*.*x", "(", "[", "a" * 5000, r"(a)\1*", "(?=a)a*", "((a{2,}){3,}){4,}"],
)
def test_what_could_take_for_ever_is_refused(pattern):
    start = time.monotonic()
    with pytest.raises(lk.LorakitError, match="here: the pattern"):
        Patterns([pattern], "here").first("a" * 40)
    assert time.monotonic() - start < 1


def test_strange_brackets_are_no_warning():
    assert Patterns(["[[ab]x"], "here").first("l.ax") == "[[ab]x"


@given(st.text("ab().*+?|[]{}\\^$0,1d", max_size=14), st.text("ab.", max_size=30))
def test_any_pattern_is_matched_or_refused_soon(pattern, name):
    start = time.monotonic()
    try:
        found = Patterns([pattern], "here").first(name)
    except lk.LorakitError:
        found = None
    assert time.monotonic() - start < 1
    assert found in (None, pattern)
