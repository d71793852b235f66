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
from lorakit.finetune.settings import Settings
from lorakit.finetune.training import checkpoints
from lorakit.finetune.training.directory import RunDirectory, begin, check_facts, locked, open_directory
from lorakit.finetune.training.progress import Line


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
    from lorakit.finetune.pause import uncollected
    from lorakit.finetune.quiet import quiet_imports
    from lorakit.finetune.training.stopping import Stopper

    quiet_imports()
    with uncollected():
        from lorakit.finetune.training.engine import build  # transformers' Trainer with it, which imports much
        from lorakit.finetune.training.preparation import prepare

    with locked(directory.path) if first else _nothing():
        prepared = prepare(settings, directory, line)
        check_facts(directory, prepared.facts)
        if directory.resume is not None and checkpoints.step_of(directory.resume) >= prepared.schedule.steps:
            return _finished(prepared, directory, line, first, begun)
        with Stopper() as stopper:
            trainer, watch = build(prepared, directory, line, stopper)
            if first:
                begin(directory, prepared.settings, prepared.facts)  # all that can be known to be wrong is right
                watch.metrics = _records(directory)
            with explained(directory, trainer, settings, first):
                trainer.train(resume_from_checkpoint=None if directory.resume is None else str(directory.resume))
        return _ended(prepared, directory, trainer, watch, begun)


def agreed(settings: Settings) -> RunDirectory:
    """What the first process finds in the run directory, in all that train together.

    Raises:
        LorakitError: a run cannot begin or go on there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return open_directory(settings)
    from lorakit.finetune.training.together import first_says

    return first_says(lambda: open_directory(settings), cpu=settings.device == "cpu")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _records(directory: RunDirectory) -> Any:
    """The files in which a run is noted."""
    from lorakit.finetune.training.record import Metrics, environment
    from lorakit.storage import write_whole

    write_whole(directory.path / "env.json", json.dumps(environment(), indent=1).encode())
    after = None if directory.resume is None else checkpoints.step_of(directory.resume)
    return Metrics(directory.path / "metrics.jsonl", after)


def _finished(prepared: Any, directory: RunDirectory, line: Line, first: bool, begun: float) -> Outcome:
    """A run that ended before."""
    assert directory.resume is not None
    line.say(f"{directory.path}: all {checkpoints.step_of(directory.resume)} steps are done already")
    if first:
        best = checkpoints.state_in(directory.resume).get("best_global_step")
        deliver(directory, prepared.settings, best)
    return _outcome(prepared, directory, None, begun, first)


def _ended(prepared: Any, directory: RunDirectory, trainer: Any, watch: Any, begun: float) -> Outcome:
    """The result where it belongs, and the reports."""
    settings, step, first = prepared.settings, trainer.state.global_step, watch.metrics is not None
    stopped = None
    if watch.stopper.noted is not None and step < prepared.schedule.steps:
        stopped = f"{watch.stopper.noted} after step {step} of {prepared.schedule.steps}"
    elif watch.tired:
        stopped = f"no better validation loss in {settings.patience} evaluations"
    if first:
        deliver(directory, settings, trainer.state.best_global_step)
    trainer.accelerator.wait_for_everyone()
    outcome = _outcome(prepared, directory, stopped, begun, first)
    if first:
        _report(prepared, outcome, watch.metrics.rows)
    return outcome


@contextmanager
def explained(directory: RunDirectory, trainer: Any, settings: Settings, first: bool) -> Iterator[None]:
    """What stops a run is one message, and what there is of the adapter is kept.

    Raises:
        LorakitError: with advice.
    """
    import torch

    from lorakit.finetune.training.trainer import NotFiniteError

    try:
        yield
    except NotFiniteError as error:
        kept = _keep_whole(directory, trainer, settings) if first else ""
        raise LorakitError(
            f"stopped: {error}. {kept}Look at the data around this step, or begin anew (overwrite=true, or another "
            f"out=) with a smaller learning_rate (it was {trainer.args.learning_rate:g}), more warmup, clip=1.0 or "
            "dtype=float32"
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


def _keep_whole(directory: RunDirectory, trainer: Any, settings: Settings) -> str:
    """Keep the adapter of a checkpoint, or else the one as it stands: the last steps have spoilt it, perhaps."""
    if not checkpoints.checkpoints_in(directory.checkpoints):
        return _keep(directory, trainer)
    chosen = deliver(directory, settings, trainer.state.best_global_step)
    return f"The adapter after step {checkpoints.step_of(chosen)} is kept in {directory.adapter}. "


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
    from lorakit.finetune.training.report import write_report

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
