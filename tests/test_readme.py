"""The README says what is there, and what it shows runs."""

import re
import shlex

import pairs
import pytest
from small_lms import STORIES, needs_stories
from typer.testing import CliRunner

import lorakit as lk
from lorakit.cli import app

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


@needs_stories
def test_the_commands_that_fine_tune_run(tmp_path, monkeypatch):
    """As they stand, one after the other, with a model in the place of path/to/model."""
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S)
    model = str(STORIES.resolve())
    monkeypatch.chdir(tmp_path)
    file, _, content = block.partition("cat > ")[2].partition(" <<'END'\n")
    (tmp_path / file).write_text(content.partition("END\n")[0], encoding="utf-8")
    commands = [line for line in block.splitlines() if line.startswith("lorakit ")]
    assert [shlex.split(line)[1] for line in commands] == ["init", "train", "train", "generate", "eval", "merge"]
    said = {}
    for line in commands:
        words = shlex.split(line.replace("$MODEL", model), comments=True)[1:]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
        said[words[0]] = result.output
    assert "SELECT COUNT(*) FROM" in said["generate"]
    assert (tmp_path / "merged" / "config.json").exists() and (tmp_path / "runs" / "sql" / "report.html").exists()
