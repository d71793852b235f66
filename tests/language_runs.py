"""A base with adapters and a run directory, as `lorakit train` leaves one, for the commands that use them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers import randomize
from small_lms import small_lm
from typer.testing import CliRunner, Result

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.base import Base, open_base


@dataclass(frozen=True)
class Files:
    """Places on disk.

    Attributes:
        base: a small model.
        sql: an adapter of it.
        js: another.
        run: a run directory whose adapter is the same as `sql`.
        data: pairs of prompt and completion.
    """

    folder: Path
    base: Path
    sql: Path
    js: Path
    run: Path
    data: Path


def made(folder: Path, *, chat: bool = False, kind: str | None = "prompt", **config: Any) -> Files:
    files = Files(folder, *(folder / name for name in ("base", "sql", "js", "run", "d.jsonl")))
    small_lm(files.base, chat=chat, **config)
    base = open_base(files.base, device="cpu")
    for seed, (name, places) in enumerate((("sql", (files.sql, files.run / "adapter")), ("js", (files.js,)))):
        lk.attach(base.model, lk.LoRA(rank=2), exclude="lm_head", name=name)
        randomize(base.model, name, seed=seed)
        for place in places:
            lk.save(base.model, place, name)
    as_run(files.run, files.base, files.data, kind)
    pairs = [("How many?", " three"), ("Who?", " the king")]
    files.data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return files


def as_run(path: Path, base: Path | str, data: Path, kind: str | None, template: str | None = None) -> None:
    """What a run directory holds beside its adapter."""
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = f"model: {base}\ndata: {data}\nname: sql\ndtype: auto\ndevice: auto\n"
    settings += f"template: {json.dumps(template)}\n"
    (path / "config.yaml").write_text(settings)
    (path / "run.json").write_text(json.dumps({} if kind is None else {"kind": kind}))


def as_other_run(files: Files, path: Path, kind: str | None = "prompt", template: str | None = None) -> Path:
    """The adapter `js` as a run that was trained in another way."""
    shutil.copytree(files.js, path / "adapter")
    as_run(path, files.base, files.data, kind, template)
    return path


def reopened(files: Files) -> Base:
    """The base with both adapters, by the library alone."""
    base = open_base(files.base, device="cpu")
    lk.load(base.model, files.sql)
    lk.load(base.model, files.js)
    return base


def command(function: Any, name: str) -> typer.Typer:
    """An application of one command, which is named as in the real one."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command(name)(function)
    return app


def ran(app: typer.Typer, *arguments: object, **how: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False, **how)
    assert result.exit_code == 0, result.output
    return result


def refused(message: str, app: typer.Typer, *arguments: object, **how: Any) -> str:
    with pytest.raises(LorakitError, match=message) as found:
        ran(app, *arguments, **how)
    return str(found.value)
