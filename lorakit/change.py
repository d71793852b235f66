"""Every change of what a model carries: add an adapter, drop it, put all aside for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from lorakit.layers import (
    AdaptedWeight,
    Adapters,
    Selection,
    Update,
    adapters_of,
    check_changeable,
    install,
    uninstall,
)
from lorakit.state import BARE, KEY, State, sites, state_of
from lorakit.variants import Variant


class Addition(NamedTuple):
    """An update that is built and waits to be installed."""

    weight: str
    """The weight's name in the model."""
    layer: nn.Module
    update: Update
    variant: Variant
    """The adapter's, or what it is for this weight."""


def add(
    root: nn.Module,
    name: str,
    variant: Variant,
    additions: list[Addition],
    *,
    trainable: bool,
    check: Callable[[], None] | None = None,
) -> None:
    """Install a new adapter on the module that holds the state or will, and make it the only one that acts.

    The base is frozen. If the new adapter is trainable, it becomes the only one that is. If `check` raises, all is
    undone.
    """
    for addition in additions:
        check_changeable(addition.layer)
    fresh = KEY not in vars(root)
    if fresh:
        trained = {own: parameter for own, parameter in root.named_parameters() if parameter.requires_grad}
        vars(root)[KEY] = State(frozen=tuple(trained))
        frozen = list(trained.values())
    else:
        frozen = [p for p in _adapter_parameters(root) if p.requires_grad] if trainable else []
    state = state_of(root)
    selected = state.selection.active, state.selection.rows
    state.variants[name] = variant
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for addition in additions:
            _add_one(addition, name, state.selection, trainable)
        state.weights[name] = {addition.weight: addition.variant for addition in additions}
        state.selection.choose([(name, 1.0)])
        if check is not None:
            check()
    except BaseException:
        state.selection.choose(*selected)
        drop(root, state, name)
        for parameter in frozen:
            parameter.requires_grad_(True)
        raise


def _add_one(addition: Addition, name: str, selection: Selection, trainable: bool) -> None:
    layer, update = addition.layer, addition.update
    adapters, parameter = adapters_of(layer), update.kind.parameter
    if update.training != layer.training:
        update.train(layer.training)
    for tensor in update.parameters() if update._modules else update._parameters.values():
        if tensor is not None and tensor.requires_grad != trainable:
            tensor.requires_grad_(trainable)
    if adapters is None:
        adapters = Adapters(layer.training)
    if parameter not in adapters:
        adapters._modules[parameter] = AdaptedWeight(selection, layer.training)
    adapted = adapters[parameter]
    adapted.put(name, update)
    if len(adapted) == 1 or not adapted.has_alike(update):
        install(layer, adapters)


def drop(root: nn.Module, state: State, name: str) -> None:
    """Take one adapter away; with the last one everything goes."""
    mine = sites(root, name)
    for site in mine:
        check_changeable(site.layer)
    for site in mine:
        if site.adapted.has_alike(site.adapted[name]):
            site.adapted.take(name)
            continue
        adapters = uninstall(site.layer)
        assert adapters is not None
        site.adapted.take(name)
        if not len(site.adapted):
            del adapters._modules[site.parameter]
        if len(adapters):
            install(site.layer, adapters)
    state.variants.pop(name, None)
    state.weights.pop(name, None)
    state.selection.forget(name)
    rows = state.selection.rows
    gone = rows is not None and name in rows.groups
    state.selection.choose([chosen for chosen in state.selection.active if chosen[0] != name], None if gone else rows)
    if not state.variants:
        _forget(root, state)


def drop_all(root: nn.Module, state: State) -> None:
    """Take every adapter away, or none if a layer forbids it."""
    for layer in _changeable_layers(root):
        uninstall(layer)
    state.variants.clear()
    state.weights.clear()
    state.selection.choose(())
    _forget(root, state)


@contextmanager
def bare(root: nn.Module) -> Iterator[None]:
    """The model without its adapters inside a `with` block: hooks, classes, children and state are put aside."""
    layers = _changeable_layers(root)
    state = vars(root).pop(KEY)
    taken = [(layer, uninstall(layer)) for layer in layers]
    modules = list(root.modules())
    BARE.update(modules)
    try:
        yield
    finally:
        BARE.difference_update(modules)
        for layer, adapters in taken:
            assert adapters is not None
            install(layer, adapters.train(layer.training))
        vars(root)[KEY] = state


def _changeable_layers(root: nn.Module) -> list[nn.Module]:
    """Every adapted layer once, checked to let its adapters go before any does."""
    layers = list({id(site.layer): site.layer for site in sites(root)}.values())
    for layer in layers:
        check_changeable(layer)
    return layers


def _forget(root: nn.Module, state: State) -> None:
    """Unfreeze what attaching froze and remove the state."""
    parameters = dict(root.named_parameters())
    for name in state.frozen:
        if name in parameters:
            parameters[name].requires_grad_(True)
    del vars(root)[KEY]


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for site in sites(model):
        yield from site.adapted.parameters()
