"""What a training run is asked for: every setting with its default, its bounds and what it means."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Group = Literal["base", "data", "adapter", "training", "watching", "run"]
GROUPS: dict[Group, str] = {
    "base": "The base",
    "data": "The data",
    "adapter": "What is trained",
    "training": "How it is trained",
    "watching": "What is seen while it runs",
    "run": "Where it goes",
}
METHODS = (
    "lora", "rslora", "dora", "lora-fa", "vera", "loha", "lokr", "adalora", "pissa", "olora", "orthogonal", "gaussian",
    "eva", "lora-ga", "loftq",
)  # fmt: skip
Method = Literal[
    "lora", "rslora", "dora", "lora-fa", "vera", "loha", "lokr", "adalora", "pissa", "olora", "orthogonal", "gaussian",
    "eva", "lora-ga", "loftq",
]  # fmt: skip

T = TypeVar("T")


def _setting(group: Group, default: Any, says: str, **bounds: Any) -> Any:
    return Field(default, description=says, json_schema_extra={"group": group}, **bounds)


def _no_truth(value: Any) -> Any:
    """True is no 1 here: `rank: yes` is a slip."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not yes or no")
    return value


def _listed(value: Any) -> Any:
    """One for a list of one."""
    return [value] if isinstance(value, str) else value


def _numeric(value: Any) -> Any:
    """YAML reads 1e-2 as text."""
    try:
        return float(value) if isinstance(value, str) else _no_truth(value)
    except ValueError:
        return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]
Names = Annotated[list[str], BeforeValidator(_listed)]


class Settings(BaseModel):
    """The settings of `lorakit train`; a setting that is not known, or out of bounds, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str = _setting("base", ..., "a directory with a transformers model, or a hub id", min_length=1)
    revision: str | None = _setting("base", None, "of a hub id: the branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "base", "auto", "of the frozen weights; auto is bfloat16 where the hardware has it, float32 on a CPU"
    )
    quantize: Literal["4bit", "8bit"] | None = _setting(
        "base", None, "4bit (QLoRA) or 8bit: the frozen weights, by bitsandbytes"
    )
    device: str = _setting("base", "auto", "auto, cpu, cuda, cuda:1, mps")
    attention: str | None = _setting("base", None, "the attention implementation: sdpa, eager, flash_attention_2")
    trust_remote_code: bool = _setting("base", False, "run code that comes with the model")

    data: str = _setting("data", ..., "a JSONL, JSON, CSV or Parquet file, or a hub id", min_length=1)
    validation: Annotated[int | float | str | None, BeforeValidator(_numeric)] = _setting(
        "data", 0.05, "a file or hub id, a share of the data (0.05), a number of rows (50), or null for none"
    )
    split: str | None = _setting("data", None, "of a hub id: the split to train on")
    columns: dict[str, str] = _setting("data", {}, "other names of columns: {prompt: question, completion: query}")
    template: str | None = _setting(
        "data", None, "a chat template (name, file or text) for messages, or a format such as '{prompt}\\n'"
    )
    train_on: Literal["completion", "all"] = _setting("data", "completion", "which tokens the loss is of")
    max_length: Whole | None = _setting(
        "data", None, "tokens of an example at most; null is the model's context, or 1024 if that is less", ge=2
    )
    truncation: Literal["cut", "drop", "error"] = _setting("data", "cut", "what is done with longer examples")
    packing: bool = _setting("data", False, "several short examples in one row, each blind to the others")

    name: str | None = _setting("adapter", None, "of the adapter; null is that of the run directory")
    method: Method = _setting("adapter", "lora", f"one of {', '.join(METHODS)}")
    rank: Whole = _setting("adapter", 16, "r, the inner dimension of B·A", ge=1)
    alpha: Number | None = _setting("adapter", None, "the scale is alpha/r; null is 2·rank, a scale of 2", gt=0)
    dropout: Number = _setting("adapter", 0.0, "of the adapter's input", ge=0, lt=1)
    targets: Names = _setting(
        "adapter", ["all-linear"], "patterns of layers; all-linear is every linear layer of the blocks, not the head"
    )
    exclude: Names = _setting("adapter", [], "patterns of layers to leave out")
    ranks: dict[str, Whole] = _setting("adapter", {}, "other ranks by pattern: {'*.q_proj': 32}")
    alphas: dict[str, Number] = _setting("adapter", {}, "other alphas by pattern")
    train_also: Names = _setting("adapter", [], "patterns of what is trained as a whole, as a copy: [lm_head]")
    options: dict[str, Any] = _setting("adapter", {}, "further arguments of the method: {factor: 8}, {seed: 1}")
    start_from: str | None = _setting("adapter", None, "an adapter to train on, in place of a new one")

    epochs: Number = _setting("training", 3.0, "times through the data", gt=0)
    steps: Whole | None = _setting("training", None, "optimizer steps; in place of epochs", ge=1)
    batch_size: Whole = _setting("training", 8, "examples at once on each device", ge=1)
    accumulation: Whole = _setting("training", 1, "batches for one optimizer step", ge=1)
    learning_rate: Number | Literal["auto"] = _setting(
        "training",
        "auto",
        "the largest; auto is 2e-4·(4096/width)^0.75, times what suits the method",
        union_mode="left_to_right",
    )
    lora_plus: Number | None = _setting("training", None, "B's learning rate is this many times A's (LoRA+: 16)", gt=0)
    schedule: Literal["cosine", "linear", "constant"] = _setting("training", "cosine", "of the learning rate")
    warmup: Number = _setting("training", 0.03, "a share of the steps (0.03) or a number of them (100)", ge=0)
    optimizer: str = _setting("training", "adamw", "adamw, or a name that transformers knows: adamw_8bit, adafactor")
    weight_decay: Number = _setting("training", 0.0, "of the adapter's tensors", ge=0)
    clip: Number = _setting("training", 1.0, "the norm of the gradient at most; 0 is no clipping", ge=0)
    gradient_checkpointing: bool = _setting("training", False, "less memory, a third more time")
    target_rank: Number | None = _setting(
        "training", None, "of adalora: the mean rank at the end; null is rank/2", gt=0
    )
    seed: Whole = _setting("training", 0, "the same seed gives the same adapter on one machine", ge=0, lt=2**32)
    trainer: dict[str, Any] = _setting(
        "training", {}, "further TrainingArguments of transformers: {fsdp: ..., deepspeed: ds.json}"
    )

    log_every: Whole = _setting("watching", 10, "steps between two lines", ge=1)
    eval_every: Whole | None = _setting("watching", None, "steps between two evaluations; null is ten in a run", ge=1)
    eval_batch_size: Whole | None = _setting("watching", None, "null is that of training", ge=1)
    patience: Whole | None = _setting("watching", None, "evaluations without a better one after which it stops", ge=1)
    samples: Whole | Names = _setting(
        "watching", 2, "prompts that are continued at each evaluation: how many of the validation data, or their texts"
    )
    sample_length: Whole = _setting("watching", 48, "tokens of a sample at most", ge=1)
    report_to: Names = _setting("watching", [], "tensorboard, wandb, trackio")

    out: str | None = _setting("run", None, "the run directory; null is runs/ and the data's name")
    resume: str = _setting(
        "run", "never", "auto goes on where a run in this directory stopped, or begins; or a checkpoint"
    )
    overwrite: bool = _setting("run", False, "begin anew though a run is there; it is deleted")
    save_every: Whole | None = _setting("run", None, "steps between two checkpoints; null is at each evaluation", ge=1)
    keep_last: Whole = _setting("run", 2, "checkpoints to keep, beside the best", ge=1)
    result: Literal["best", "last"] = _setting("run", "best", "which is the adapter: by validation loss, or the last")

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if isinstance(self.learning_rate, float) and self.learning_rate <= 0:
            raise ValueError("learning_rate: must be above 0")
        share = self.validation
        if isinstance(share, int | float) and share < 0:
            raise ValueError(f"validation: {share} is neither a share nor a number of rows; null is for none")
        if isinstance(share, float) and share >= 1 and not share.is_integer():
            raise ValueError(f"validation: {share} is neither a share below 1 nor a number of rows")
        if self.target_rank is not None and self.method != "adalora":
            raise ValueError(f"target_rank: is of the method adalora, not of {self.method}")
        if self.target_rank is not None and self.target_rank > self.rank:
            raise ValueError(f"target_rank: {self.target_rank:g} is above the rank {self.rank} that is begun with")
        if self.start_from is not None:
            self._check_brought()
        if isinstance(self.samples, int) and self.samples < 0:
            raise ValueError("samples: must be 0 or more")
        if self.overwrite and self.resume != "never":
            raise ValueError("overwrite: begins anew, and resume goes on; choose one")
        return self

    def _check_brought(self) -> None:
        """An adapter to train on is what it is: settings that say otherwise would be without effect."""
        brought = (
            "method",
            "rank",
            "alpha",
            "dropout",
            "targets",
            "exclude",
            "ranks",
            "alphas",
            "train_also",
            "options",
        )
        changed = [name for name in brought if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"start_from: the adapter brings its own {', '.join(changed)}; leave them as they are")
