"""The Trainer of a run, with all that hangs on it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from transformers import PrinterCallback

from lorakit.budget import RankBudget
from lorakit.errors import LorakitError
from lorakit.finetune.data import collate, stops_of
from lorakit.finetune.generation.generate import context_of
from lorakit.finetune.training.directory import RunDirectory
from lorakit.finetune.training.preparation import Prepared
from lorakit.finetune.training.progress import Line
from lorakit.finetune.training.samples import Sample, continued, prompts_of
from lorakit.finetune.training.stopping import Stopper
from lorakit.finetune.training.trainer import AdapterTrainer
from lorakit.finetune.training.watching import Watch


class Examples(Dataset[Any]):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def build(prepared: Prepared, directory: RunDirectory, line: Line, stopper: Stopper) -> tuple[AdapterTrainer, Watch]:
    """The Trainer, ready to train, and who watches it; nothing is written yet.

    Raises:
        LorakitError: the Trainer or the optimizer refuses the settings, or sharding was asked for where there is none.
    """
    settings, schedule, base = prepared.settings, prepared.schedule, prepared.base
    watch = Watch(line, stopper, lambda: [], settings.patience)
    try:
        trainer = AdapterTrainer(
            settings=settings,
            name=prepared.name,
            folder=directory.checkpoints,
            model=base.model,
            args=prepared.arguments,
            train_dataset=Examples(prepared.data.train),
            eval_dataset=Examples(prepared.data.validation) if prepared.data.validation else None,
            data_collator=partial(collate, pad_id=base.tokenizer.pad_token_id),
            callbacks=[watch],
        )
    except (ValueError, ImportError) as error:
        raise LorakitError(f"transformers' Trainer refuses these settings: {error}") from None
    if settings.trainer.get("fsdp") and not trainer.is_fsdp_enabled:
        raise LorakitError(
            f"trainer.fsdp: accelerate shards no model on {base.model.device.type}; it needs GPUs, and a launcher "
            "(torchrun --nproc-per-node N -m lorakit train ...)"
        )
    if not trainer.is_deepspeed_enabled:  # which makes its own
        try:
            trainer.create_optimizer()
        except (ValueError, ImportError, TypeError) as error:
            raise LorakitError(f"optimizer: {settings.optimizer} cannot be used here: {error}") from None
    trainer.remove_callback(PrinterCallback)
    watch.trainer = trainer
    if trainer.is_world_process_zero() and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        watch.sampled = _sampled(prepared)
    if settings.method == "adalora":
        target = settings.target_rank if settings.target_rank is not None else settings.rank / 2
        steps = max(schedule.steps, 4)
        trainer.budget = RankBudget(
            base.model,
            target,
            steps,
            warmup=steps // 10,
            final=steps // 4,
            every=max(1, steps // 100),
            name=prepared.name,
        )
    return trainer, watch


def _sampled(prepared: Prepared) -> Any:
    settings, base = prepared.settings, prepared.base
    context = context_of(base.model)
    length = settings.sample_length if context is None else min(settings.sample_length, context // 2)
    room = 2**20 if context is None else context - length
    prompts = prompts_of(settings.samples, prepared.data.rows, base.tokenizer, settings.template, room)

    stops = stops_of(prepared.data.rows.kind, base.tokenizer, settings.template)

    def sampled() -> list[Sample]:
        return continued(base.model, base.tokenizer, prompts, length, stops)

    return sampled
