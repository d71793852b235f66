"""The README says what is there."""

import re

import pairs

import lorakit as lk


def test_the_table_of_pairs_is_what_the_lists_make():
    assert pairs.README.read_text(encoding="utf-8") == pairs.written(), "run `make tables`"


def test_every_public_name_is_named():
    text = pairs.README.read_text(encoding="utf-8")
    missing = [name for name in lk.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == ["LorakitError"]
