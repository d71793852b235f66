"""A training run, from settings to an adapter in a directory."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.finetune import checkpoints
from lorakit.finetune.directory import RunDirectory, begin, locked, open_directory
from lorakit.finetune.progress import Line
from lorakit.finetune.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        path: the run directory.
        adapter: where the adapter is.
        step: after which step it was.
        steps: how many there were to be.
        stopped: why it ended before that; None if it did not.
        eval_loss: the validation loss of the adapter, if there was validation.
        seconds: what this process took.
        first: whether this process is the first of those that train together, or the only one.
    """

    path: Path
    adapter: Path
    step: int
    steps: int
    stopped: str | None
    eval_loss: float | None
    seconds: float
    first: bool = True


def train(settings: Settings, line: Line | None = None) -> Outcome:
    """Train an adapter as the settings say.

    Args:
        settings: what is asked for.
        line: where to show how it goes; by default nowhere.

    Returns:
        What came of it.

    Raises:
        LorakitError: something is wrong with the settings, the data, the base or the directory, and nothing was
            changed; or the run had to stop (the loss was no number, memory ran out, the disk was full), and the
            message says what is kept and how to go on.
    """
    begun = time.perf_counter()
    line = Line(quiet=True) if line is None else line
    first = int(os.environ.get("RANK", "0")) == 0
    if not first:
        line = Line(quiet=True)
    directory = agreed(settings)
    for note in directory.notes:
        line.say(note)
    from lorakit.finetune.quiet import quiet_imports, uncollected

    quiet_imports()
    with uncollected():
        from lorakit.finetune.engine import build  # transformers' Trainer with it, which imports much
        from lorakit.finetune.preparation import prepare

    with locked(directory.path) if first else _nothing():
        prepared = prepare(settings, directory, line)
        if first:
            begin(directory, prepared.settings, prepared.facts)
        return _run(prepared, build, directory, line, first, begun)


def agreed(settings: Settings) -> RunDirectory:
    """What the first process finds in the run directory, in all that train together.

    Raises:
        LorakitError: a run cannot begin or go on there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return open_directory(settings)
    from lorakit.finetune.together import first_says

    return first_says(lambda: open_directory(settings), cpu=settings.device == "cpu")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _run(prepared: Any, build: Any, directory: RunDirectory, line: Line, first: bool, begun: float) -> Outcome:
    from lorakit.finetune.record import Metrics, environment
    from lorakit.finetune.stopping import Stopper
    from lorakit.storage import write_whole

    settings, schedule = prepared.settings, prepared.schedule
    resume = directory.resume
    done = 0 if resume is None else checkpoints.step_of(resume)
    if done >= schedule.steps:
        line.say(f"{directory.path}: all {done} steps are done already")
        if first and resume is not None:
            deliver(directory, settings, checkpoints.state_in(resume).get("best_global_step"))
        return _outcome(prepared, directory, None, begun, first)
    metrics = None
    if first:
        metrics = Metrics(directory.path / "metrics.jsonl", None if resume is None else done)
        write_whole(directory.path / "env.json", json.dumps(environment(), indent=1).encode())
    with Stopper() as stopper:
        trainer, watch = build(prepared, directory, line, metrics, stopper)
        with explained(directory, trainer, settings, first):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    stopped = None
    if stopper.noted is not None and trainer.state.global_step < schedule.steps:
        stopped = f"{stopper.noted} after step {trainer.state.global_step} of {schedule.steps}"
    elif watch.tired:
        stopped = f"no better validation loss in {settings.patience} evaluations"
    if first:
        deliver(directory, settings, trainer.state.best_global_step)
    trainer.accelerator.wait_for_everyone()
    outcome = _outcome(prepared, directory, stopped, begun, first)
    if metrics is not None:
        _report(prepared, outcome, metrics.rows)
    return outcome


@contextmanager
def explained(directory: RunDirectory, trainer: Any, settings: Settings, first: bool) -> Iterator[None]:
    """What stops a run is one message, and what there is of the adapter is kept.

    Raises:
        LorakitError: with advice.
    """
    import torch

    from lorakit.finetune.trainer import NotFiniteError

    try:
        yield
    except NotFiniteError as error:
        kept = _keep(directory, trainer) if first else ""
        raise LorakitError(
            f"stopped: {error}. {kept}Try a smaller learning_rate (it was {trainer.args.learning_rate:g}), more "
            "warmup, clip=1.0, or dtype=float32; look at the data around this step"
        ) from None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        kept = _keep(directory, trainer) if first else ""
        raise LorakitError(
            f"out of memory in step {trainer.state.global_step + 1}. {kept}{_lighter(settings)}"
        ) from None
    except checkpoints.CheckpointError as error:
        found, _ = checkpoints.newest(directory.checkpoints)
        kept = f"the checkpoint {found} is whole" if found is not None else "there is no earlier checkpoint"
        raise LorakitError(f"{error}; {kept}") from None
    except OSError as error:
        raise LorakitError(
            f"stopped in step {trainer.state.global_step + 1}: {error}; go on with resume=auto"
        ) from None


def _is_memory(error: BaseException) -> bool:
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _lighter(settings: Settings) -> str:
    advice = []
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        more = math.ceil(settings.accumulation * settings.batch_size / half)
        advice.append(f"batch_size={half} accumulation={more} (the same result)")
    if not settings.gradient_checkpointing:
        advice.append("gradient_checkpointing=true")
    if settings.quantize != "4bit":
        advice.append("quantize=4bit")
    advice.append("a smaller max_length")
    return f"Try {', '.join(advice)}"


def _keep(directory: RunDirectory, trainer: Any) -> str:
    """Save the adapter as it stands after the last step, if it is in order, and say where."""
    from lorakit.files import save

    try:
        save(trainer.accelerator.unwrap_model(trainer.model), directory.adapter, trainer.adapter)
    except (LorakitError, RuntimeError, MemoryError) as error:
        found, _ = checkpoints.newest(directory.checkpoints)
        return f"The last checkpoint is {found} ({error}). " if found is not None else ""
    return f"The adapter after step {trainer.state.global_step} is kept in {directory.adapter}. "


def deliver(directory: RunDirectory, settings: Settings, best: int | None) -> Path:
    """Copy the adapter of the best checkpoint, or of the last, to where the run's result is."""
    from lorakit.storage import write_directory

    last, _ = checkpoints.newest(directory.checkpoints)
    chosen = last
    if settings.result == "best" and best is not None:
        place = directory.checkpoints / checkpoints.name_of_step(best)
        chosen = place if place.is_dir() else last
    if chosen is None:
        raise LorakitError(f"there is no checkpoint in {directory.checkpoints}")
    source = chosen / checkpoints.ADAPTER
    write_directory(directory.adapter, {path.name: path.read_bytes() for path in source.iterdir()})
    return chosen


def _report(prepared: Any, outcome: Outcome, rows: Any) -> None:
    """The picture and the page."""
    from lorakit.finetune.report import write_report

    facts = {
        "name": prepared.name,
        "base": prepared.settings.model,
        **{name: getattr(outcome, name) for name in ("step", "steps", "stopped", "eval_loss", "seconds")},
        "adapter_bytes": sum(path.stat().st_size for path in outcome.adapter.iterdir()),
    }
    write_report(outcome.path, facts, prepared.plan, prepared.data.report, prepared.settings.model_dump(), rows)


def _outcome(prepared: Any, directory: RunDirectory, stopped: str | None, begun: float, first: bool) -> Outcome:
    last, _ = checkpoints.newest(directory.checkpoints)
    state = {} if last is None else checkpoints.state_in(last)
    losses = {row["step"]: row["eval_loss"] for row in state.get("log_history", []) if "eval_loss" in row}
    step = int(state.get("global_step", 0))
    best = state.get("best_global_step")
    shown = best if prepared.settings.result == "best" and best is not None else step
    return Outcome(
        directory.path,
        directory.adapter,
        step,
        prepared.schedule.steps,
        stopped,
        losses.get(shown),
        time.perf_counter() - begun,
        first,
    )
