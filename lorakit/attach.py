"""Put an adapter on a model, and take it off again."""

import warnings

import torch
from torch import nn

from lorakit.change import Addition, add, drop, drop_all
from lorakit.patterns import Targets
from lorakit.plan import Plan, draw_up
from lorakit.state import require
from lorakit.targets import RequestedMode
from lorakit.variants import Variant


def plan(
    model: nn.Module,
    variant: Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    mode: RequestedMode = "auto",
    name: str = "default",
) -> Plan:
    """What `attach` would do with the same arguments; `print` it for a table. Changes nothing."""
    return draw_up(model, variant, targets, exclude, mode, name)[0]


def attach(
    model: nn.Module,
    variant: Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    mode: RequestedMode = "auto",
    name: str = "default",
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

    Returns:
        What was done; `print` it for a table.

    Raises:
        LorakitError: a target matches nothing or cannot be adapted, the name is taken, ...; the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))
        >>> report = attach(model, LoRA(rank=8), targets="0")
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    """
    report, places = draw_up(model, variant, targets, exclude, mode, name)
    with torch.inference_mode(False):  # tensors made in inference mode could never be trained
        additions = [
            Addition(place.layer, place.kind, variant.build(place.kind, place.weight, place.mode)) for place in places
        ]
    cautions = [
        f"{place.label!r}: {caution}"
        for place in places
        if (caution := variant.caution(place.kind, place.weight)) is not None
    ]
    add(model, name, variant, additions, trainable=True)
    if cautions:
        warnings.warn("; ".join(cautions), stacklevel=2)
    return report


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
