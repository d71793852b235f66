"""Which variant a method's name stands for, and putting it on a model."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from lorakit.attach import attach, plan
from lorakit.errors import LorakitError
from lorakit.evidence import Loss
from lorakit.files import load
from lorakit.finetune.settings import Settings
from lorakit.plan import Plan
from lorakit.resident import set_trainable
from lorakit.variants import AdaLoRA, DoRA, LoHa, LoKr, LoRA, LoRAFA, Variant, VeRA

_METHODS: Mapping[str, tuple[type[Variant], Mapping[str, Any]]] = {
    "lora": (LoRA, {}),
    "rslora": (LoRA, {"scaling": "rslora"}),
    "gaussian": (LoRA, {"init": "gaussian"}),
    "orthogonal": (LoRA, {"init": "orthogonal"}),
    "pissa": (LoRA, {"init": "pissa"}),
    "olora": (LoRA, {"init": "olora"}),
    "eva": (LoRA, {"init": "eva"}),
    "lora-ga": (LoRA, {"init": "lora-ga"}),
    "loftq": (LoRA, {"init": "loftq"}),
    "dora": (DoRA, {}),
    "lora-fa": (LoRAFA, {}),
    "vera": (VeRA, {}),
    "loha": (LoHa, {}),
    "lokr": (LoKr, {}),
    "adalora": (AdaLoRA, {}),
}


def variant_of(settings: Settings) -> Variant:
    """The variant with the hyper-parameters of the settings.

    Raises:
        LorakitError: the method has no such hyper-parameter, or one is out of bounds.
    """
    build, fixed = _METHODS[settings.method]
    known = {field.name for field in fields(build)}
    if settings.lora_plus is not None and "B" not in build.file_names:
        raise LorakitError(f"lora_plus: the method {settings.method} has no factor B; leave it null")
    arguments: dict[str, Any] = {**fixed, "rank": settings.rank}
    if "alpha" in known:
        arguments["alpha"] = 2.0 * settings.rank if settings.alpha is None else settings.alpha
    elif settings.alpha is not None:
        raise LorakitError(f"alpha: the method {settings.method} has none; leave it null")
    if settings.dropout:
        if "dropout" not in known:
            raise LorakitError(f"dropout: the method {settings.method} has none; leave it 0")
        arguments["dropout"] = settings.dropout
    strange = settings.options.keys() - known
    if strange:
        allowed = ", ".join(sorted(known - arguments.keys())) or "none"
        raise LorakitError(f"options: {settings.method} has no {', '.join(sorted(strange))}; there are: {allowed}")
    both = settings.options.keys() & arguments.keys()
    if both:
        raise LorakitError(f"options: {', '.join(sorted(both))} has a setting of its own, or follows from the method")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.options.items()}
    return build(**arguments, **options)


def targets_of(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """The arguments of `attach` that say what is adapted.

    "all-linear" leaves the output head out, as the usual recipes do: it is as large as the embedding, often tied to it,
    and no layer of a block. Naming it adapts it.
    """
    exclude = list(settings.exclude)
    if settings.targets == ["all-linear"]:
        exclude += [name for name in heads(model) if name not in settings.train_also]
    return {
        "targets": list(settings.targets),
        "exclude": exclude or None,
        "ranks": settings.ranks or None,
        "alphas": _alphas(settings),
        "train_also": list(settings.train_also) or None,
    }


def _alphas(settings: Settings) -> dict[str, float] | None:
    """Where the alpha follows from the rank, it does so for the ranks by pattern too."""
    followed = {}
    if settings.alpha is None and "alpha" in {field.name for field in fields(_METHODS[settings.method][0])}:
        followed = {pattern: 2.0 * rank for pattern, rank in settings.ranks.items()}
    return {**followed, **settings.alphas} or None


def heads(model: nn.Module) -> list[str]:
    """Where the model's output head is."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return [] if head is None else [name for name, module in model.named_modules() if module is head]


def cautions(model: nn.Module, plan: Plan) -> list[str]:
    """What a user should know of a plan, though it works: what is left out, and what is said of its weights."""
    said = []
    adapted = {row.layer.rpartition(".")[0] for row in plan.rows} | {row.layer for row in plan.rows}
    experts = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and not {path, f"{path}.{name}"} & adapted
    ]
    if experts:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", experts[0])
        said.append(
            f"{len(experts)} stacks of experts, such as {experts[0]}, are not adapted: all-linear is of layers; "
            f"targets=[all-linear, '{pattern}'] takes them too"
        )
    noted = [row for row in plan.rows if row.note]
    if noted:
        more = f" (so {len(noted) - 1} more weights)" if len(noted) > 1 else ""
        said.append(f"{noted[0].layer}: {noted[0].note}{more}")
    return said


def planned(model: nn.Module, settings: Settings, name: str) -> Plan:
    """What would be attached, for a model of shapes; to a real one, the adapter to train on is attached.

    Raises:
        LorakitError: a target matches nothing or cannot be adapted.
    """
    if settings.start_from is not None:
        return load(model, settings.start_from, name, verify="off", trainable=True)
    return plan(model, variant_of(settings), name=name, **targets_of(model, settings))


def adapt(
    model: nn.Module,
    settings: Settings,
    name: str,
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    loss: Loss | None = None,
    original: nn.Module | None = None,
) -> Plan:
    """Attach a new adapter as the settings say, or the one to train on.

    Args:
        model: the base.
        settings: what is asked for.
        name: the adapter's.
        batches: for the methods whose start is computed from data.
        loss: for lora-ga: (model, batch) -> loss.
        original: for loftq: the model before it was quantized.

    Raises:
        LorakitError: a target matches nothing or cannot be adapted, or the adapter to train on does not fit.
    """
    if settings.start_from is not None:
        report = load(model, settings.start_from, name, trainable=True)
        set_trainable(model, name, True)
        return report
    variant = variant_of(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan, which is shown, holds its cautions
        return attach(
            model,
            variant,
            name=name,
            data=batches if variant.needs in ("inputs", "gradients") else None,
            loss=loss if variant.needs == "gradients" else None,
            original=original if variant.needs == "original" else None,
            **targets_of(model, settings),
        )
