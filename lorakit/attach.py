"""Put an adapter on a model, and take it off again."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.change import Addition, add, drop, drop_all
from lorakit.errors import LorakitError
from lorakit.evidence import Loss, Sources, gather
from lorakit.layers import Update
from lorakit.patterns import Targets
from lorakit.plan import ByPattern, Plan, draw_up
from lorakit.probe import ProbeReport, probe_with
from lorakit.state import require
from lorakit.targets import Place, RequestedMode
from lorakit.variants import Variant


def plan(
    model: nn.Module,
    variant: Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    mode: RequestedMode = "auto",
    name: str = "default",
    ranks: ByPattern | None = None,
    alphas: ByPattern | None = None,
    train_also: Targets | None = None,
    train_rows: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """What `attach` would do with the same arguments; `print` it for a table. Changes nothing."""
    return draw_up(model, variant, targets, exclude, mode, name, ranks, alphas, train_also, train_rows)[1]


def attach(
    model: nn.Module,
    variant: Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    mode: RequestedMode = "auto",
    name: str = "default",
    ranks: ByPattern | None = None,
    alphas: ByPattern | None = None,
    train_also: Targets | None = None,
    train_rows: Mapping[str, Sequence[int]] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    original: nn.Module | None = None,
    example: Any = None,
) -> Plan:
    """Add a new adapter to a model, in place, and freeze everything else.

    The model stays the same object, with the same class, signature and parameter names; its output does not change
    by a bit. The new adapter becomes the only active and the only trainable one: adapters that were there stay
    resident, and come back with `activate` and `set_trainable`.

    Args:
        model: any module.
        variant: what to train, such as `LoRA(rank=8)`.
        targets: which weights: "all-linear"; a name, whole or its last parts; a glob; a compiled regex, which is
            searched; a type; a function (name, module) -> bool; or a list of these. A name that is a parameter's
            ("encoder.in_proj_weight") selects that parameter, of any module; a layer's selects all its weights. Of the
            packed projection of attention "q_proj_weight" and its like select one slice. Every pattern must match.
        exclude: patterns to leave out; a module is left out with all that it holds.
        mode: "auto" puts the update beside the call of a layer that is called, and in the weight where the weight is
            read; "beside" and "weight" force one.
        name: what to call the adapter: no dot, space or path separator.
        ranks: other ranks by pattern, as for `targets`: {"*.q_proj": 16}. The last pattern that matches counts.
        alphas: other alphas, likewise. Without an alpha the scale of each weight is 1, whatever its rank.
        train_also: what is trained as a whole beside it, with the patterns of `targets`: modules with all that they
            hold (a head, a norm), or parameters (a bias). As a copy: the base keeps its own. Comes before `targets`.
        train_rows: rows trained as a whole, such as new tokens of an embedding: {"embed": [50257, 50258]}.
        data: for an init that is computed from data: batches that the model is called with (a mapping by name, a
            tuple or list in order), or that `loss` takes. They are run on the base, in the mode the model is in.
        loss: a function (model, batch) -> loss.
        original: for init="loftq": the model before it was quantized.
        example: an input of the model (a tensor, a tuple, or a mapping by name). It is run, as by `probe`, and if an
            update does not reach the output, attaching is undone and an error names the weights.

    Returns:
        What was done; `print` it for a table.

    Raises:
        LorakitError: a target matches nothing or cannot be adapted, the name is taken, ...; the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))
        >>> report = attach(model, LoRA(rank=8), targets="0")
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    """
    root, report, choices = draw_up(model, variant, targets, exclude, mode, name, ranks, alphas, train_also, train_rows)
    with torch.inference_mode(False):  # tensors made in inference mode could never be trained
        evidence = gather(Sources(model, data, loss, original), choices)
        additions = [
            Addition(place.parameter, place.layer, _built(place, mine, seen), mine)
            for (place, mine, _), seen in zip(choices, evidence, strict=True)
        ]
    cautions = [f"{place.label!r}: {sketch.caution}" for place, _, sketch in choices if sketch.caution is not None]

    def check() -> None:
        args = () if isinstance(example, Mapping) else example if isinstance(example, tuple | list) else (example,)
        named = example if isinstance(example, Mapping) else {}
        _check_effect(probe_with(model, args, named, name))

    add(root, name, report.variant, additions, trainable=True, check=None if example is None else check)
    if cautions:
        warnings.warn("; ".join(cautions), stacklevel=2)
    return report


def _check_effect(report: ProbeReport) -> None:
    if report.ok:
        return
    lost = [f"{row.weight!r} is {row.train} in train(), {row.eval} in eval()" for row in report.weights if not row.ok]
    raise LorakitError(
        f"not attached, for on the example {'; '.join(lost)}. Unreached: the layer did not run; exclude it. Bypassed: "
        "it ran past the update; use mode='weight'"
    )


def _built(place: Place, variant: Variant, evidence: Tensor | None) -> Update:
    """The update for one weight. A quantized one is only dequantized for a variant that looks at its values."""
    weight = place.weight if variant.reads_weight else place.outline
    if variant.reads_weight and not weight.is_meta and not weight.isfinite().all():
        raise LorakitError(f"at {place.label!r}: the weight holds NaN or infinity; nothing can start from it")
    try:
        return variant.build(place.kind, weight, place.mode, evidence)
    except LorakitError as error:
        raise LorakitError(f"at {place.label!r}: {error}") from None


def detach(model: nn.Module) -> None:
    """Take off every adapter: the model is as it came, to the bit, and trainable where it was.

    Raises:
        LorakitError: the model has no adapter, or is inside `merged(...)`.
    """
    root, state = require(model)
    drop_all(root, state)


def remove(model: nn.Module, name: str) -> None:
    """Take off one adapter and forget its tensors; the choice among the others stays. The last one detaches.

    Raises:
        LorakitError: there is no adapter of this name.
    """
    root, state = require(model, [name])
    drop(root, state, name)
