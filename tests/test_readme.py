"""The README says what is there, and what it shows runs."""

import re

import pairs
import pytest

import lorakit as lk

TEXT = pairs.README.read_text(encoding="utf-8")
SCRIPTS = [code for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S) if code.startswith("import ")]


def test_the_table_of_pairs_is_what_the_lists_make():
    assert pairs.written() == TEXT, "run `make tables`"


def test_every_public_name_is_named():
    missing = [name for name in lk.__all__ if not re.search(rf"\b{name}\b", TEXT)]
    assert missing == ["LorakitError"]


@pytest.mark.parametrize("code", [code for code in SCRIPTS if "model = " in code], ids=["plain", "four-bits", "values"])
def test_the_scripts_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
