"""What happens beside the steps: lines, numbers, samples, and stopping in between."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.finetune.training.progress import Line, line
from lorakit.finetune.training.record import Metrics, memory
from lorakit.finetune.training.samples import Sample
from lorakit.finetune.training.stopping import Stopper
from lorakit.finetune.training.trainer import AdapterTrainer

_REDRAW = 0.2
"""Seconds between two looks of a terminal's line."""


class Watch(TrainerCallback):
    """Notes and shows how the training of one run goes.

    Args:
        line: where to show it.
        stopper: who is asked whether to stop.
        sampled: makes the samples of an evaluation.
        patience: evaluations without a better one after which to stop.
    """

    def __init__(
        self,
        line: Line,
        stopper: Stopper,
        sampled: Callable[[], list[Sample]],
        patience: int | None,
    ) -> None:
        self.line, self.stopper, self.sampled, self.patience = line, stopper, sampled, patience
        self.metrics: Metrics | None = None
        """Where to note it; None in all processes but the first."""
        self.trainer: AdapterTrainer | None = None
        self.facts: dict[str, Any] = {}
        self.tired = False
        """Whether patience ran out."""
        self._begun = self._noted = self._drawn = 0.0
        self._paused = 0.0
        self._first = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts."""
        self._begun = self._noted = time.perf_counter()
        self._first = state.global_step
        self.facts = {"step": state.global_step, "steps": state.max_steps}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """AdaLoRA looks at the gradients while they are there."""
        if self._its.budget is not None:
            self._its.budget.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop if somebody asks for it."""
        now = time.perf_counter()
        if self.line.live and now - self._drawn > _REDRAW:
            self._drawn = now
            self.facts |= {"step": state.global_step, "left": self._left(state)}
            self.line.update(line(self.facts))
        if self.stopper.wanted():
            control.should_training_stop = control.should_save = True
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A line for the terminal and one for the file."""
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:
            return
        tokens = self._its.read_tokens()
        now, paused = time.perf_counter(), self._its.paused
        seconds = max(now - self._noted - (paused - self._paused), 1e-9)
        self._noted, self._paused = now, paused
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            **{name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs},
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "memory": memory(args.device),
            "seconds": round(now - self._begun, 3),
        }
        self._add(row)
        self.facts |= {**row, "steps": state.max_steps, "left": self._left(state)}
        self.line.note(line(self.facts))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The validation loss, and what the model writes now."""
        metrics: dict[str, float] = kwargs["metrics"]
        with self._its.pausing():
            samples = self.sampled()
        self._add(
            {
                "step": state.global_step,
                **metrics,
                **({"samples": [vars(sample) for sample in samples]} if samples else {}),
            }
        )
        self.facts |= {"eval_loss": metrics["eval_loss"]}
        self.line.say(f"step {state.global_step}: validation loss {metrics['eval_loss']:.4f}, perplexity "
                      f"{metrics['eval_perplexity']:.4g}")  # fmt: skip
        for sample in samples:
            self.line.say(f"  {_short(sample.prompt, -40)} → {_short(sample.text, 60)}")
        if self.patience is not None and self._waited(state) >= self.patience:
            self.tired = True
            control.should_training_stop = control.should_save = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The line stays."""
        self.line.end()

    @property
    def _its(self) -> AdapterTrainer:
        assert self.trainer is not None
        return self.trainer

    def _add(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.add(**row)

    def _left(self, state: TrainerState) -> float | None:
        """Seconds, as the steps went so far."""
        done = state.global_step - self._first
        return (time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step) if done else None

    def _waited(self, state: TrainerState) -> int:
        """Evaluations since the best one, this one counted; from the history, which a checkpoint holds."""
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        best = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]), default=0)
        return len(losses) - 1 - best


def _short(text: str, most: int) -> str:
    """On one line: the first characters, or the last ones where `most` is below zero."""
    flat = " ".join(text.split())
    if len(flat) <= abs(most):
        return flat
    return f"{flat[:most]}…" if most > 0 else f"…{flat[most:]}"
