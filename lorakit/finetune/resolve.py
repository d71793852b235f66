"""What a place on the command line means: a base, a training run, a checkpoint of one, or an adapter alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.errors import LorakitError
from lorakit.storage import name_of, read_json_object

ADAPTER, CONFIG, CHECKPOINTS = "adapter", "config.yaml", "checkpoints"
_LARGE = 50 * 2**20
"""Bytes of data that are not read only to learn of what kind its rows are."""


class Resolved(NamedTuple):
    """A base, and what goes with it."""

    model: str
    """A directory or a hub id."""
    adapters: dict[str, Path]
    """Adapters that the place itself holds, by name: one or none."""
    settings: dict[str, Any]
    """Those of the training run; empty if there was none."""


def resolve(where: str | Path) -> Resolved:
    """The base that is meant, with its adapter if the place is a training run, a checkpoint or an adapter.

    Args:
        where: a directory with a model of transformers, or a hub id; a run directory of `lorakit train`, or one of its
            checkpoints; or the directory of an adapter whose config names its base.

    Raises:
        LorakitError: a run has no adapter yet, its config cannot be read, or an adapter does not name its base.
    """
    path = Path(where).expanduser()
    if not path.is_dir() or (path / "config.json").exists():
        return Resolved(str(where), {}, {})
    run = _run_of(path)
    if run is not None:
        settings = _settings(run)
        model = settings.get("model")
        if not isinstance(model, str) or not model:
            raise LorakitError(f"{run / CONFIG} names no model")
        name = settings.get("name")
        name = name if isinstance(name, str) and name else name_of(run)
        return Resolved(near(model, run), {name: adapter_at(path)}, settings)
    if (path / "adapter_config.json").exists():
        base = read_json_object(path / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise LorakitError(
                f"{path} is an adapter that does not name its base: give the base, and this as --adapter {path}"
            )
        return Resolved(near(base, path), {name_of(path): path}, {})
    return Resolved(str(where), {}, {})


def adapter_at(path: str | Path) -> Path:
    """Where the adapter is that a path means: itself, or in the run directory or checkpoint that it names.

    Raises:
        LorakitError: it is a run that has no adapter yet.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or (path / "adapter_config.json").exists():
        return path
    if (path / ADAPTER / "adapter_config.json").exists():
        return path / ADAPTER
    if (path / CONFIG).exists() and (path / CHECKPOINTS).is_dir():
        whole = sorted(each for each in (path / CHECKPOINTS).glob("step-*") if (each / ADAPTER).is_dir())
        hint = f", or take its last checkpoint: {whole[-1]}" if whole else ""
        raise LorakitError(f"the run in {path} has not ended, and has no adapter yet: go on with resume=auto{hint}")
    return path


def kind_of(resolved: Resolved) -> str | None:
    """Of what kind the rows were that the run was trained on: text, prompt, instruction or messages.

    A prompt is to be encoded as they were. None if there was no run, or it cannot be told.
    """
    return _kind(_run_of(next(iter(resolved.adapters.values()))), resolved.settings) if resolved.settings else None


class Training(NamedTuple):
    """How the run of an adapter was trained."""

    kind: str | None
    """Of its rows: see `kind_of`."""
    template: str | None
    settings: dict[str, Any]


def training_of(adapter: str | Path) -> Training | None:
    """How an adapter was trained, by the run directory that the path is or lies in; None if there is none.

    Raises:
        LorakitError: the config of the run cannot be read.
    """
    path = Path(adapter).expanduser()
    run = _run_of(path) if path.is_dir() else None
    if run is None:
        return None
    settings = _settings(run)
    template = settings.get("template")
    if isinstance(template, str) and "{" not in template and Path(near(template, run)).is_file():
        template = near(template, run)
    return Training(_kind(run, settings), template, settings)


def naming(where: str | Path) -> Path | None:
    """The file that says which base goes with a run or an adapter; None for any other place."""
    path = Path(where).expanduser()
    if not path.is_dir() or (path / "config.json").exists():
        return None
    run = _run_of(path)
    if run is not None:
        return Path(os.path.relpath(run / CONFIG)) if not path.is_absolute() else run / CONFIG
    return path / "adapter_config.json" if (path / "adapter_config.json").exists() else None


def _kind(run: Path | None, settings: Mapping[str, Any]) -> str | None:
    told = _facts(run).get("kind") if run is not None else None
    if isinstance(told, str):
        return told
    data = settings.get("data")
    path = Path(near(data, run)) if isinstance(data, str) and run is not None else Path()
    if not path.is_file() or path.stat().st_size > _LARGE:
        return None
    from lorakit.finetune.data import read_rows

    try:
        return read_rows(str(path), columns=settings.get("columns") or None).kind
    except LorakitError:
        return None  # it has changed since


def near(where: str, place: Path) -> str:
    """A path as it was given, or seen from a directory above `place`: a run may be used from elsewhere."""
    path = Path(where).expanduser()
    if path.is_absolute() or path.exists():
        return where
    above = (parent / path for parent in place.resolve().parents)
    return next((str(each) for each in above if each.exists()), where)


def _run_of(path: Path) -> Path | None:
    """The run directory that a path is, or lies in as its adapter or a checkpoint."""
    path = path.resolve()
    for run in (path, *path.parents[:4]):
        if (run / CONFIG).is_file() and ((run / ADAPTER).is_dir() or (run / CHECKPOINTS).is_dir()):
            inside = path.relative_to(run).parts
            return run if inside[:1] in ((), (ADAPTER,), (CHECKPOINTS,)) else None
    return None


def _settings(run: Path) -> dict[str, Any]:
    from lorakit.finetune.config import read_yaml

    return read_yaml(run / CONFIG)


def _facts(run: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(run / "run.json")
    except LorakitError:
        return {}
