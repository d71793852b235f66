"""`--dry-run`: what a run would do, without doing it, and without loading the base's weights."""

import sys

import torch

from lorakit.finetune.base import DTYPES, device_named, dtype_on, open_base, open_outline
from lorakit.finetune.data import shown
from lorakit.finetune.settings import Settings
from lorakit.finetune.training.arguments import arguments_of, length_of, schedule_of, width_of
from lorakit.finetune.training.directory import open_directory
from lorakit.finetune.training.estimate import estimate
from lorakit.finetune.training.groups import as_table
from lorakit.finetune.training.methods import cautions, planned
from lorakit.finetune.training.preparation import check, encode_data, read_data
from lorakit.finetune.training.progress import Line

_MOST = 1500
"""Characters of the example that is shown."""


def rehearse(settings: Settings, line: Line) -> None:
    """Show the data, the targets, the parameters, the memory, the steps and one example.

    Raises:
        LorakitError: the run itself would fail so.
    """
    directory = open_directory(settings)
    check(settings)
    device = device_named(settings.device)
    rows = read_data(settings)
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if settings.start_from is None:
        base = open_outline(settings.model, **source)  # type: ignore[arg-type]
    else:  # what an adapter is on shows when it is loaded
        base = open_base(settings.model, device="cpu", **source)  # type: ignore[arg-type]
    model, config, tokenizer = base.model, base.model.config, base.tokenizer
    data = encode_data(settings, rows, tokenizer, length_of(settings, model))
    plan = planned(model, settings, directory.name)
    schedule = schedule_of(settings, len(data.train), len(data.validation), width_of(config))
    arguments_of(settings, schedule, directory.checkpoints, device)
    dtype = _dtype(settings, device)
    longest = max(map(len, data.train))
    memory = estimate(
        model,
        config,
        plan,
        quantize=settings.quantize,
        bytes_each=dtype.itemsize,
        tokens=settings.batch_size * longest,
        checkpointing=settings.gradient_checkpointing,
    )
    numbers = sum(parameter.numel() for parameter in model.parameters())
    quantized = f", quantized to {settings.quantize}" if settings.quantize else ""
    line.say(
        f"base        {settings.model}: {type(model).__name__}, {numbers:,} numbers, {dtype}{quantized}, on {device}"
    )
    line.say(f"data        {settings.data}")
    line.say(_indented(data.report))
    if settings.packing:
        line.say(
            f"            packed into {len(data.train):,} rows; that examples are blind to each other the run proves"
        )
    line.say("adapter")
    line.say(_indented(as_table(plan), 2))
    for caution in cautions(model, plan):
        line.say(f"            {caution}")
    line.say(f"memory      {memory}")
    passes = f"{schedule.steps / schedule.steps_an_epoch:.3g} times through the data"
    line.say(f"steps       {schedule.steps:,} of {schedule.examples_a_step} examples, {passes}")
    line.say(f"rate        up to {schedule.learning_rate:g} in {schedule.warmup} steps, then {settings.schedule}")
    every = f"every {schedule.eval_every} steps" if schedule.eval_every else "never, there is no validation data"
    line.say(f"evaluated   {every}; a checkpoint every {schedule.save_every}")
    where = f"goes on from {directory.resume}" if directory.resume else "begins"
    line.say(f"directory   {directory.path}: {where}")
    example = data.encoded.examples[0]
    line.say(f"example     {example.where}; what is trained on stands {_legend()}:")
    line.say(_marked(shown(example, tokenizer)))


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    return dtype_on(device) if settings.dtype == "auto" else DTYPES[settings.dtype]


def _legend() -> str:
    return "in green" if sys.stdout.isatty() else "in ⟦ ⟧"


def _marked(pieces: list[tuple[str, bool]]) -> str:
    """The text with its trained parts in colour, or in brackets."""
    start, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    left, out = _MOST, []
    for text, trained in pieces:
        part = text[: max(left, 0)]
        left -= len(text)
        if part:
            out.append(f"{start}{part}{end}" if trained else part)
    return "".join(out) + ("…" if left < 0 else "")


def _indented(text: str, width: int = 12) -> str:
    return "\n".join(" " * width + row for row in text.splitlines())
