"""Settings as the arguments of transformers' Trainer, and the numbers that follow from them and the data."""

import dataclasses
import difflib
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lorakit.errors import LorakitError
from lorakit.finetune.generation.generate import context_of
from lorakit.finetune.settings import Settings

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
_DECIDED = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "auto_find_batch_size", "dataloader_drop_last",
    "do_eval", "do_predict", "do_train", "enable_jit_checkpoint", "eval_delay", "eval_on_start",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "ignore_data_skip", "label_names",
    "length_column_name", "load_best_model_at_end", "num_train_epochs", "push_to_hub", "resume_from_checkpoint",
    "save_only_model", "save_total_limit", "train_sampling_strategy",
}  # fmt: skip
"""Arguments of transformers that would be without effect here, or against a setting."""
_WIDE = 4096
_RATE = 2e-4
"""The rate that the QLoRA paper found for models of this width (arXiv:2305.14314, table 9)."""
_POWER = 0.75
"""How it grows for narrower ones: a model 64 wide learns best at 5e-3 (docs/measurements.md)."""
_FACTORS = {
    "rslora": 0.5, "pissa": 0.5, "olora": 0.5, "lora-ga": 0.5, "lora-fa": 3.0, "loha": 3.0, "lokr": 3.0, "adalora": 3.0,
    "vera": 10.0,
}  # fmt: skip
"""What suits a method, against LoRA's: measured there too."""


@dataclass(frozen=True)
class Schedule:
    """How long a run is and when what happens, in optimizer steps."""

    steps: int
    steps_an_epoch: int
    examples_a_step: int
    eval_every: int | None
    save_every: int
    learning_rate: float
    warmup: int


def processes() -> int:
    """How many processes train together, as their launcher says."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def schedule_of(settings: Settings, rows: int, validation: int, width: int) -> Schedule:
    """The schedule for so many rows of training data and a model of this width."""
    batches = math.ceil(math.ceil(rows / processes()) / settings.batch_size)
    each = max(1, math.ceil(batches / settings.accumulation))
    steps = settings.steps if settings.steps is not None else math.ceil(settings.epochs * each)
    tenth = max(1, math.ceil(steps / 10))
    eval_every = (settings.eval_every or tenth) if validation else None
    save_every = settings.save_every or eval_every or tenth
    # Rounded down: the first step of a warm-up has a rate of zero, and a run of a few steps has none to lose.
    warmup = int(settings.warmup if settings.warmup >= 1 else settings.warmup * steps)
    if warmup >= steps:
        raise LorakitError(f"warmup: {warmup} steps are not fewer than the run's {steps}; give a share, such as 0.03")
    return Schedule(
        steps,
        each,
        settings.batch_size * settings.accumulation * processes(),
        eval_every,
        save_every,
        auto_rate(width, settings.method) if settings.learning_rate == "auto" else settings.learning_rate,
        warmup,
    )


def auto_rate(width: int, method: str = "lora") -> float:
    """2e-4 for a model 4096 wide, more for narrower ones, 2e-4·(4096/width)^0.75, times the method's; two digits."""
    return float(f"{_RATE * (_WIDE / width) ** _POWER * _FACTORS.get(method, 1.0):.1e}")


def width_of(config: Any) -> int:
    """The width of a model's residual stream."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    return _WIDE


def length_of(settings: Settings, model: Any) -> int:
    """How long examples may be.

    Raises:
        LorakitError: longer ones were asked for than the model has positions.
    """
    context = context_of(model)
    if settings.max_length is None:
        return min(1024, context or 1024)
    if context is not None and settings.max_length > context:
        raise LorakitError(f"max_length: {settings.max_length} is more than the model's context of {context}")
    return settings.max_length


def arguments_of(settings: Settings, schedule: Schedule, folder: Path, device: torch.device) -> TrainingArguments:
    """The arguments of the Trainer.

    Raises:
        LorakitError: `trainer:` has an argument that is unknown or that a setting decides, or one that the Trainer
            refuses; an optimizer or a tracker is unknown or not installed.
    """
    check_trackers(settings.report_to)
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.eval_batch_size or settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "max_steps": schedule.steps,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        "warmup_steps": schedule.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "optim": "adamw_torch_fused" if settings.optimizer == "adamw" else settings.optimizer,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_strategy": "steps",
        "logging_steps": settings.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it hides what must stop the run
        "eval_strategy": "steps" if schedule.eval_every else "no",
        "eval_steps": schedule.eval_every,
        "save_strategy": "steps",
        "save_steps": schedule.save_every,
        "metric_for_best_model": "loss" if schedule.eval_every else None,
        "greater_is_better": False,
        "report_to": list(settings.report_to),
        "run_name": settings.name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "fp16": settings.dtype == "float16" and device.type == "cuda",
        "dataloader_pin_memory": device.type == "cuda",
        "include_num_input_tokens_seen": "no",
        "log_level": "error",
    }
    free = {"ddp_find_unused_parameters": False}  # every tensor of an adapter is reached
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in settings.trainer:
        if name in own or name in _DECIDED or name.startswith("hub_"):
            raise LorakitError(f"trainer.{name}: a setting of lorakit decides that; see `lorakit train --help`")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise LorakitError(f"trainer.{name}: transformers' TrainingArguments has no such argument{hint}")
    try:
        return TrainingArguments(**{**own, **free, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        if "OptimizerNames" in str(error):
            near = difflib.get_close_matches(settings.optimizer, _optimizers(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise LorakitError(f"optimizer: transformers knows no {settings.optimizer!r}{hint}") from None
        raise LorakitError(f"transformers refuses these arguments: {error}") from None


def _optimizers() -> list[str]:
    from transformers.training_args import OptimizerNames

    return ["adamw", *(str(each.value) for each in OptimizerNames)]


def check_trackers(names: list[str]) -> None:
    """Whether each tracker is known and installed.

    Raises:
        LorakitError: one is not.
    """
    for name in names:
        if name not in _TRACKERS:
            raise LorakitError(f"report_to: there is no {name!r}; choose of {', '.join(_TRACKERS)}")
        if not any(importlib.util.find_spec(package) for package in _TRACKERS[name]):
            raise LorakitError(f"report_to: {name} is not installed; pip install {_TRACKERS[name][0]}")
