"""What a model remembers of its adapters, and how to find it.

`attach` leaves one `State` in the `__dict__` of the model it was called on. It travels with deepcopy and pickle, is
no parameter and no buffer, and goes when the last adapter goes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorakit.errors import LorakitError
from lorakit.layers import (
    AdaptedWeight,
    Adapters,
    Kind,
    Parameter,
    Selection,
    Update,
    adapters_of,
    check_changeable,
    forget_compiled,
    install,
    uninstall,
)
from lorakit.variants import Variant

_KEY = "_lorakit_state"
_BARE: WeakSet[nn.Module] = WeakSet()  # models inside `merged(...)`, which are plain for a while


@dataclass
class State:
    """The adapters of one model."""

    selection: Selection = field(default_factory=Selection)
    variants: dict[str, Variant] = field(default_factory=dict)
    """Resident adapters by name, in the order in which they came."""
    frozen: tuple[str, ...] = ()
    """Names of the base's parameters that attaching froze; detaching unfreezes them."""


@dataclass(frozen=True)
class Site:
    """One adapted weight of a model."""

    path: str
    """The layer's name in the model; "" is the model itself."""
    layer: nn.Module
    parameter: str
    adapted: AdaptedWeight

    @property
    def name(self) -> str:
        """The name of the adapted parameter in the model."""
        return join(self.path, self.parameter)


def join(path: str, name: str) -> str:
    """A dotted name."""
    return f"{path}.{name}" if path else name


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) of the base, a shared module once under each of its names; nothing that lorakit added."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Adapters):
                yield from walk(child, join(path, name))

    return walk(model, "")


def sites(model: nn.Module, name: str | None = None) -> list[Site]:
    """The adapted weights in the model's order, each layer once under its first name; of one adapter if named."""
    seen: set[int] = set()
    found = []
    for path, layer in layers_of(model):
        adapters = adapters_of(layer)
        if adapters is None or id(layer) in seen:
            continue
        seen.add(id(layer))
        found += [Site(path, layer, parameter, adapters[parameter]) for parameter in adapters]
    return [site for site in found if name is None or name in site.adapted]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, not what `torch.compile` made of it."""
    if not isinstance(model, nn.Module):
        raise LorakitError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    return model._modules.get("_orig_mod") or model


def find_root(model: nn.Module) -> nn.Module | None:
    """The module that holds the state: the one given to `attach`; None if the model has no adapter.

    That is the model itself, or the one inside a wrapper such as `DistributedDataParallel`.
    """
    model = unwrapped(model)
    if _KEY in vars(model):
        return model
    holders: dict[int, tuple[str, nn.Module]] = {}
    for path, module in layers_of(model):
        if module in _BARE:
            raise LorakitError("inside merged(...) the model is bare: leave the block first")
        if _KEY in vars(module):
            holders[id(module)] = path, module
    if len(holders) > 1:
        parts = ", ".join(repr(path) for path, _ in holders.values())
        raise LorakitError(
            f"adapters were attached to {len(holders)} parts of this {type(model).__name__} one by one "
            f"({parts}): call this on one of them"
        )
    if holders:
        return next(iter(holders.values()))[1]
    if sites(model):
        raise LorakitError(
            f"this {type(model).__name__} is a part of a model that has adapters: call this on the "
            "model that was given to attach"
        )
    return None


def state_of(root: nn.Module) -> State:
    """The state that lies in this very module."""
    state = vars(root)[_KEY]
    assert isinstance(state, State)
    return state


def require(model: nn.Module, names: list[str] | None = None) -> tuple[nn.Module, State]:
    """The module that holds the state, and the state, checked to have these adapters."""
    root = find_root(model)
    if root is None:
        raise LorakitError(f"this {type(model).__name__} has no adapter: attach or load one first")
    state = state_of(root)
    unknown = [name for name in names or [] if name not in state.variants]
    if unknown:
        raise LorakitError(
            f"no adapter named {', '.join(map(repr, unknown))}; resident: {', '.join(map(repr, state.variants))}"
        )
    return root, state


def one_name(state: State, name: str | None) -> str:
    """The adapter that is meant: the one named, else the only one resident."""
    if name is not None:
        return name
    if len(state.variants) != 1:
        raise LorakitError(f"which adapter? Resident: {', '.join(map(repr, state.variants))}; give name=...")
    return next(iter(state.variants))


def check_addition(model: nn.Module, name: str) -> None:
    """Whether an adapter of this name can be added: not yet resident, and safe as a key of a state dict."""
    if isinstance(unwrapped(model), DistributedDataParallel):
        raise LorakitError("add adapters before DistributedDataParallel: it would not know of their gradients")
    if not isinstance(name, str) or not name:
        raise LorakitError(f"an adapter's name must be a non-empty string, not {name!r}")
    if re.search(r"[/\\.\s\x00-\x1f]", name):
        raise LorakitError(
            f"adapter name {name!r}: a name may not hold a path separator, a dot or a space; use '-' or '_'"
        )
    if hasattr(AdaptedWeight(Parameter("weight"), Selection()), name):
        raise LorakitError(f"adapter name {name!r} is taken by torch.nn.Module; choose another")
    if find_root(model) is not None and name in require(model)[1].variants:
        raise LorakitError(
            f"an adapter named {name!r} is already resident: choose another name, or remove that one first"
        )


@dataclass(frozen=True)
class Addition:
    """An update that is built and waits to be installed."""

    layer: nn.Module
    kind: Kind
    update: Update


def add(model: nn.Module, name: str, variant: Variant, additions: list[Addition], *, trainable: bool) -> None:
    """Install a new adapter and make it the only one that acts; the base, and adapters before it, are frozen."""
    root = find_root(model) or unwrapped(model)
    for addition in additions:
        check_changeable(addition.layer)
    fresh = _KEY not in vars(root)
    if fresh:
        vars(root)[_KEY] = State(frozen=tuple(n for n, p in root.named_parameters() if p.requires_grad))
    state = state_of(root)
    state.variants[name] = variant
    selected = state.selection.active
    try:
        for parameter in root.parameters() if fresh else _adapter_parameters(root):
            parameter.requires_grad_(False)
        for addition in additions:
            _add_one(addition, name, state.selection, trainable)
        state.selection.active = ((name, 1.0),)
        forget_compiled()
    except BaseException:
        state.selection.active = selected
        drop(root, state, name)
        raise


def _add_one(addition: Addition, name: str, selection: Selection, trainable: bool) -> None:
    layer, parameter = addition.layer, addition.kind.parameter
    adapters = adapters_of(layer) or Adapters()
    if parameter not in adapters:
        adapters.add_module(parameter, AdaptedWeight(addition.kind, selection))
    adapters[parameter].add_module(name, addition.update.requires_grad_(trainable))
    adapters.train(layer.training)
    install(layer, adapters)


def drop(root: nn.Module, state: State, name: str) -> None:
    """Take one adapter away; with the last one everything goes."""
    for site in sites(root, name):
        check_changeable(site.layer)
    for site in sites(root, name):
        adapters = uninstall(site.layer)
        assert adapters is not None
        del site.adapted._modules[name]
        if not len(site.adapted):
            del adapters._modules[site.parameter]
        if len(adapters):
            install(site.layer, adapters)
    state.variants.pop(name, None)
    state.selection.active = tuple(chosen for chosen in state.selection.active if chosen[0] != name)
    forget_compiled()
    if not state.variants:
        forget(root, state)


def drop_all(root: nn.Module, state: State) -> None:
    """Take every adapter away, or none if a layer forbids it."""
    for site in sites(root):
        check_changeable(site.layer)
    for name in list(state.variants):
        drop(root, state, name)


@contextmanager
def bare(root: nn.Module) -> Iterator[None]:
    """The model without its adapters inside a `with` block: hooks, classes, children and state are put aside."""
    layers = {id(site.layer): site.layer for site in sites(root)}.values()
    for layer in layers:
        check_changeable(layer)
    state = vars(root).pop(_KEY)
    taken = [(layer, uninstall(layer)) for layer in layers]
    _BARE.add(root)
    forget_compiled()
    try:
        yield
    finally:
        _BARE.discard(root)
        for layer, adapters in taken:
            assert adapters is not None
            install(layer, adapters.train(layer.training))
        vars(root)[_KEY] = state
        forget_compiled()


def forget(root: nn.Module, state: State) -> None:
    """Unfreeze what attaching froze and remove the state."""
    parameters = dict(root.named_parameters())
    for name in state.frozen:
        if name in parameters:
            parameters[name].requires_grad_(True)
    del vars(root)[_KEY]


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for site in sites(model):
        yield from site.adapted.parameters()
