"""Everything that a run needs before its first step: data in tokens, the base with its adapter, and a schedule."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from lorakit.errors import LorakitError
from lorakit.finetune.base import Base, device_named, open_base
from lorakit.finetune.data import Encoded, Rows, check_packing, collate, encode, pack, read_rows, split_off
from lorakit.finetune.settings import Settings
from lorakit.finetune.training.arguments import (
    Schedule,
    arguments_of,
    check_trackers,
    length_of,
    processes,
    schedule_of,
    width_of,
)
from lorakit.finetune.training.checkpoints import ADAPTER
from lorakit.finetune.training.directory import RunDirectory
from lorakit.finetune.training.methods import adapt, cautions, variant_of
from lorakit.finetune.training.progress import Line
from lorakit.fingerprint import fingerprint
from lorakit.plan import Plan

_START = 16
"""Batches that a start from data is computed from."""


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Attributes:
        train: to train on; packed rows if that was asked for.
        validation: to judge by, one example a row.
        rows: the rows of the validation data, for prompts.
        report: what was read, cut and dropped, as text.
        tokens: of the training data: all, and those that are trained on.
        encoded: the training data before it was packed.
        digests: checksums of the examples to train on and to judge by.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    rows: Rows
    report: str
    tokens: tuple[int, int]
    encoded: Encoded
    digests: tuple[str, str]


@dataclass(frozen=True)
class Prepared:
    """What a run is made of."""

    settings: Settings
    name: str
    base: Base
    plan: Plan
    data: Data
    schedule: Schedule
    arguments: TrainingArguments
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_data(settings: Settings) -> tuple[Rows, Rows]:
    """The rows to train on, and those to judge by.

    Raises:
        LorakitError: rows are wrong, all of which are named, or none is left to train on.
    """
    rows = read_rows(settings.data, columns=settings.columns, split=settings.split)
    share = settings.validation
    if isinstance(share, str):
        return rows, read_rows(share, columns=settings.columns)
    if not share:
        return rows, rows[:0]
    if len(rows) < 2:
        raise LorakitError(
            f"{settings.data} has one row, of which none can be split off: validation=null, or more data"
        )
    return split_off(rows, share, settings.seed)


def encode_data(settings: Settings, rows: tuple[Rows, Rows], tokenizer: Any, length: int) -> Data:
    """The rows as tokens.

    Raises:
        LorakitError: nothing is left to train on, or an example is too long and that is to be an error.
    """
    how = {"truncation": settings.truncation, "train_on": settings.train_on, "template": settings.template}
    train = encode(rows[0], tokenizer, max_length=length, **how)  # type: ignore[arg-type]
    validation = encode(rows[1], tokenizer, max_length=length, **how) if len(rows[1]) else None  # type: ignore[arg-type]
    if not train.examples:
        raise LorakitError(f"nothing is left to train on: {train.report}")
    report = f"{train.report}" + (f"\nvalidation: {validation.report}" if validation is not None else "")
    return Data(
        pack(train, length) if settings.packing else train.examples,
        [] if validation is None else validation.examples,
        rows[1] if len(rows[1]) else rows[0],
        report,
        (train.report.tokens, train.report.trained_tokens),
        train,
        (train.digest()[:16], "" if validation is None else validation.digest()[:16]),
    )


def check(settings: Settings) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        LorakitError: it is.
    """
    device_named(settings.device)
    check_trackers(list(settings.report_to))
    variant_of(settings)
    if settings.revision is not None and Path(settings.model).is_dir():
        raise LorakitError(f"revision: {settings.model} is a directory, which has none; leave it null")


def prepare(settings: Settings, directory: RunDirectory, line: Line) -> Prepared:
    """Read, load and attach.

    Raises:
        LorakitError: anything is wrong; nothing was written.
    """
    name = directory.name
    check(settings)
    rows = read_data(settings)
    base = open_base(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        attention=settings.attention,
    )
    data = encode_data(settings, rows, base.tokenizer, length_of(settings, base.model))
    for note in base.notes:
        line.say(note)
    line.say(data.report)
    if settings.packing:
        check_packing(base.model)
        line.say(f"packed: {len(data.encoded.examples):,} examples in {len(data.train):,} rows")
    known = base_digest(base.model)
    schedule = schedule_of(settings, len(data.train), len(data.validation), width_of(base.model.config))
    resolved = settings.model_copy(update={"name": name, "out": str(directory.path)})
    arguments = arguments_of(resolved, schedule, directory.checkpoints, base.model.device)
    plan = attach(settings, base, data, name, directory.resume)
    share = f"{plan.percent:.3g}% of the base's {plan.base_parameters:,}"
    line.say(f"adapter {name!r}: {plan.variant} on {len(plan.rows)} weights, {plan.parameters:,} numbers, {share}")
    for caution in cautions(base.model, plan):
        line.say(caution)
    facts = {
        "data": data.digests[0],
        "validation": data.digests[1],
        "base": known,
        "processes": processes(),
        "kind": rows[0].kind,
    }
    return Prepared(resolved, name, base, plan, data, schedule, arguments, facts)


def base_digest(model: nn.Module) -> str:
    """Of values spread over every weight of a base, also those that no adapter is on: 16 hex digits."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {fingerprint(tensor)}\n".encode())
    return found.hexdigest()[:16]


def attach(settings: Settings, base: Base, data: Data, name: str, resume: Path | None) -> Plan:
    """A new adapter, drawn from the seed; or that of a checkpoint.

    Raises:
        LorakitError: a target matches nothing, or the adapter is of another base.
    """
    if settings.gradient_checkpointing:
        checkpoint_gradients(base.model)
    if settings.quantize is not None:
        base.model._hf_peft_config_loaded = True  # what transformers asks before it trains over a quantized base
    set_seed(settings.seed)
    if resume is not None:
        from_there = settings.model_copy(update={"start_from": str(resume / ADAPTER)})
        return adapt(base.model, from_there, name)
    needs = None if settings.start_from is not None else variant_of(settings).needs
    batches = _start_batches(settings, base, data) if needs in ("inputs", "gradients") else None
    original = None
    if needs == "original":
        original = open_base(settings.model, device=settings.device, dtype="float32", revision=settings.revision).model
    return adapt(base.model, settings, name, batches=batches, loss=model_loss, original=original)


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that a model of transformers computes from labels."""
    loss: Tensor = model(**batch).loss
    return loss


def _start_batches(settings: Settings, base: Base, data: Data) -> list[dict[str, Tensor]]:
    """The first batches of the training data, as the Trainer would collate them."""
    size, pad = settings.batch_size, base.tokenizer.pad_token_id
    starts = range(0, min(len(data.train), size * _START), size)
    batches = [collate(data.train[start : start + size], pad) for start in starts]
    return [{key: value.to(base.model.device) for key, value in batch.items()} for batch in batches]


def checkpoint_gradients(model: Any) -> None:
    """Layers compute their activations anew in the backward pass; this way needs no gradient of the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise LorakitError(f"gradient_checkpointing: a {type(model).__name__} cannot do that; leave it false")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the newer name is that of transformers 5.20 and later
