"""Transformers' Trainer, whose checkpoints hold the adapter and not the base, and which stops where it must."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from lorakit.budget import RankBudget
from lorakit.errors import LorakitError
from lorakit.files import save
from lorakit.finetune.settings import Settings
from lorakit.finetune.training import checkpoints
from lorakit.flat import flat_parameter
from lorakit.resident import adapter_parameter_groups, adapter_parameters

_IGNORED = -100
_BUDGET = "budget.pt"


class NotFiniteError(LorakitError):
    """The loss became NaN or infinite."""


class AdapterTrainer(Trainer):
    """Trains one adapter of a model that lorakit has adapted in place.

    Args:
        settings: of the run.
        name: the adapter that is trained.
        folder: where checkpoints go.
        **arguments: as of `Trainer`.
    """

    def __init__(self, *, settings: Settings, name: str, folder: Path, **arguments: Any) -> None:
        self.settings, self.adapter, self.folder = settings, name, folder
        self.flat: nn.Parameter | None = None
        self.tokens = torch.zeros((), dtype=torch.int64)
        """Tokens that were trained on, padding not counted, since the last reading."""
        self.budget: RankBudget | None = None
        self._numbers: int | None = None
        self.paused = 0.0
        """Seconds that went into evaluations and checkpoints."""
        super().__init__(**arguments)

    # The optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One flat tensor for an Adam of one learning rate; LoRA+'s groups, or the adapter's tensors, for others."""
        if self.optimizer is not None:
            return self.optimizer
        inner: Any = self.model if model is None else model
        options = {"weight_decay": self.args.weight_decay}
        build, arguments = self.get_optimizer_cls_and_kwargs(self.args, inner)
        groups: list[dict[str, Any]]
        if self.settings.lora_plus is not None:
            groups = adapter_parameter_groups(
                inner, self.args.learning_rate, self.settings.lora_plus, self.adapter, **options
            )
        elif build is torch.optim.AdamW and self._stays:
            self.flat = flat_parameter(inner, self.adapter)
            groups = [{"params": [self.flat], **options}]
        else:
            groups = [{"params": [p for p in adapter_parameters(inner, self.adapter) if p.requires_grad], **options}]
        self.optimizer = build(groups, **arguments)
        return self.optimizer

    @property
    def _stays(self) -> bool:
        """Whether tensors stay where they are once the processes meet: accelerate moves a CPU's to "cpu:0", a copy."""
        moved = self.args.device.type == "cpu" and self.accelerator.num_processes > 1
        return not (moved or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.flat is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return self._clip_flat(self.flat, self.args.max_grad_norm)

    def _clip_flat(self, flat: nn.Parameter, most: float) -> Tensor:
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_([flat], most)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; one that is no number stops before it reaches the adapter, in all processes."""
        if grad_norm is None and self.flat is not None:
            grad_norm = self._clip_flat(self.flat, math.inf)
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        scaled = self.accelerator.scaler is not None  # a scaler leaves such steps out by itself
        if norm is not None and not scaled and not math.isfinite(norm):
            raise NotFiniteError(f"the gradient's norm is {float(norm)} in step {self.state.global_step + 1}")
        return norm

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A batch forward and backward; a loss that is no number stops before it reaches the adapter."""
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes == 1 and not math.isfinite(loss.item()):
            raise NotFiniteError(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; with AdaLoRA's penalty, as its share in the accumulated step."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.budget is None or not model.training:
            return result
        share = self.budget.penalty() / self.current_gradient_accumulation_steps
        return (result[0] + share, result[1]) if return_outputs else result + share

    def read_tokens(self) -> int:
        """Tokens of all processes since the last reading."""
        count = self.accelerator.gather(self.tokens.to(self.args.device).reshape(1)).sum()
        self.tokens = torch.zeros((), dtype=torch.int64)
        return int(count.item())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """An estimate, from the number of parameters, which is counted once."""
        if self._numbers is None:
            model: Any = self.model
            self._numbers = int(model.num_parameters(exclude_embeddings=True))
        return 6 * int(inputs["input_ids"].numel()) * self._numbers

    def train(self, *arguments: Any, **named: Any) -> Any:
        """As of `Trainer`, which walks over all modules twice in each step for what is known."""
        with self._unhurried(self.model):
            return super().train(*arguments, **named)

    @contextmanager
    def _unhurried(self, model: Any) -> Iterator[None]:
        """Inside, `train()` of a model that trains already does nothing, and `zero_grad()` is that of what is trained.

        In a model of many small layers these walks take some hundredths of a step.
        """
        walk_train, walk_zero = model.train, model.zero_grad

        def train(mode: bool = True) -> Any:
            return model if mode is model.training else walk_train(mode)

        def zero_grad(set_to_none: bool = True) -> None:
            if self.flat is None:
                walk_zero(set_to_none)
            else:
                self.flat.grad = None

        model.train, model.zero_grad = train, zero_grad
        try:
            yield
        finally:
            del model.train, model.zero_grad

    # Evaluation

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The validation loss: the mean over all trained tokens, whatever batches and processes they lie in."""
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        training = model.training
        model.eval()
        total, count = 0.0, 0
        with self.pausing(), kept_rng():
            for inputs in self.get_eval_dataloader():
                inputs = self._prepare_inputs(inputs)
                labels = inputs.pop("labels")
                losses, counts = row_losses(model(**inputs).logits, labels)
                losses, counts = self.accelerator.gather_for_metrics((losses, counts))
                total, count = total + losses.double().sum().item(), count + int(counts.sum().item())
        model.train(training)
        loss = total / count if count else math.nan
        if not math.isfinite(loss):
            raise NotFiniteError(f"the validation loss is {loss} after step {self.state.global_step}")
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best so far is always kept."""
        best: bool = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or best
        return best

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time in the block is none of training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, first = self.state.global_step, self.is_world_process_zero()
        beside = nullcontext(checkpoints.place_of(self.folder, step))
        with self.pausing(), checkpoints.written(self.folder, step) if first else beside as place:
            self.accelerator.wait_for_everyone()  # until the directory is there
            self._write(place)
            self.accelerator.wait_for_everyone()  # until all have written
        if first:
            checkpoints.keep(self.folder, self.settings.keep_last, self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _write(self, place: Path) -> None:
        """Each process writes its part."""
        first = self.is_world_process_zero()
        if first or self.is_fsdp_enabled:  # shards are gathered from all
            save(self.accelerator.unwrap_model(self.model), place / checkpoints.ADAPTER, self.adapter)
        if first:
            self.state.save_to_json(str(place / "trainer_state.json"))
            if self.budget is not None:
                torch.save(self.budget.state_dict(), place / _BUDGET)
        self._save_optimizer_and_scheduler(str(place))
        self._save_scaler(str(place))
        self._save_rng_state(str(place))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter was loaded before there was a Trainer; what a budget had noted comes here."""
        path = Path(resume_from_checkpoint) / _BUDGET
        if self.budget is not None and path.exists():
            self.budget.load_state_dict(torch.load(path, weights_only=True))


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the summed loss of its trained tokens, and how many they are.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), −100 where nothing is asked.
    """
    losses, counts = [], []
    for row, wanted in zip(logits, labels, strict=True):  # by rows: float32 logits of all at once may not fit
        aim = wanted[1:]
        losses.append(F.cross_entropy(row[:-1].float(), aim, ignore_index=_IGNORED, reduction="sum"))
        counts.append((aim != _IGNORED).sum())
    return torch.stack(losses), torch.stack(counts)


@contextmanager
def kept_rng() -> Iterator[None]:
    """Random numbers drawn inside are not missed outside: when to evaluate changes no training."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
