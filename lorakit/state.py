"""What a model remembers of its adapters, and how to find it.

`attach` leaves one `State` in the `__dict__` of the model it was called on. It travels with deepcopy and pickle, is
no parameter and no buffer, and goes when the last adapter goes.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorakit.errors import LorakitError
from lorakit.layers import AdaptedWeight, Adapters, Selection, adapters_of
from lorakit.variants import Variant

KEY = "_lorakit_state"
"""Where the state lies in the `__dict__` of the model given to `attach`."""
BARE: WeakSet[nn.Module] = WeakSet()
"""The modules of models inside `merged(...)`, which are plain for a while."""


@dataclass
class State:
    """The adapters of one model."""

    selection: Selection = field(default_factory=Selection)
    variants: dict[str, Variant] = field(default_factory=dict)
    """Resident adapters by name, in the order in which they came."""
    weights: dict[str, dict[str, Variant]] = field(default_factory=dict)
    """The weights that each adapter was added to, by name, with the variant at each: ranks may differ."""
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
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        if module._modules:
            prefix = f"{path}." if path else ""
            below = [
                (prefix + name, child)
                for name, child in module._modules.items()
                if child is not None and not isinstance(child, Adapters)
            ]
            waiting += reversed(below)


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
    if "_orig_mod" not in model._modules:
        return model
    return cast(nn.Module, model._modules["_orig_mod"])


def find_root(model: nn.Module) -> nn.Module | None:
    """The module that holds the state: the one given to `attach`; None if the model has no adapter.

    That is the model itself, or the one inside a wrapper such as `DistributedDataParallel`.
    """
    model = unwrapped(model)
    if KEY in vars(model):
        return model
    holders: dict[int, tuple[str, nn.Module]] = {}
    adapted, some_are_bare = False, len(BARE) > 0
    for path, module in layers_of(model):
        if some_are_bare and module in BARE:
            raise LorakitError("inside merged(...) the model is bare: leave the block first")
        if KEY in vars(module):
            holders[id(module)] = path, module
        adapted = adapted or adapters_of(module) is not None
    if len(holders) > 1:
        parts = ", ".join(repr(path) for path, _ in holders.values())
        raise LorakitError(
            f"adapters were attached to {len(holders)} parts of this {type(model).__name__} one by one "
            f"({parts}): call this on one of them"
        )
    if holders:
        return next(iter(holders.values()))[1]
    if adapted:
        raise LorakitError(
            f"this {type(model).__name__} is a part of a model that has adapters: call this on the model that was "
            "given to attach (a copy of a part is its own master if it is made inside merged(...))"
        )
    return None


def state_of(root: nn.Module) -> State:
    """The state that lies in this very module."""
    state = vars(root)[KEY]
    assert isinstance(state, State)
    if state.selection.tables is None:  # a copy
        state.selection.reindex(site.adapted for site in sites(root))
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


def check_complete(root: nn.Module, state: State, name: str) -> list[Site]:
    """The sites of an adapter, checked to be all the weights it was added to.

    Raises:
        LorakitError: a layer was replaced since; its part of the adapter went with it.
    """
    found = sites(root, name)
    lost = set(state.weights[name]) - {site.name for site in found}
    if lost:
        raise LorakitError(
            f"adapter {name!r} has lost {', '.join(map(repr, sorted(lost)))}: the layers were replaced after it was "
            "added; add it again, or put the layers back"
        )
    return found


def check_together(state: State, names: Collection[str]) -> None:
    """Whether these adapters can act at the same time.

    Raises:
        LorakitError: two of them rescale one weight as a whole, which has no sum.
    """
    owner: dict[str, str] = {}
    for name in names if len(names) > 1 else ():
        for weight, variant in state.weights[name].items():
            if variant.exclusive and owner.setdefault(weight, name) != name:
                raise LorakitError(
                    f"adapters {owner[weight]!r} and {name!r} cannot act together: at {weight!r} each rescales the "
                    f"whole weight ({type(variant).__name__}), and two rescalings have no sum; activate one of them"
                )


def one_name(state: State, name: str | None) -> str:
    """The adapter that is meant: the one named, else the only one resident."""
    if name is not None:
        return name
    if len(state.variants) != 1:
        raise LorakitError(f"which adapter? Resident: {', '.join(map(repr, state.variants))}; give name=...")
    return next(iter(state.variants))


def check_addition(model: nn.Module, name: str) -> nn.Module:
    """The module that an adapter of this name is added to: the one that holds the state, or that will.

    Raises:
        LorakitError: the name is resident already or no safe key of a state dict, or the model is in no state for it.
    """
    if isinstance(unwrapped(model), DistributedDataParallel):
        raise LorakitError("add adapters before DistributedDataParallel: it would not know of their gradients")
    if not isinstance(name, str) or not name:
        raise LorakitError(f"an adapter's name must be a non-empty string, not {name!r}")
    if re.search(r"[/\\.\s\x00-\x1f]", name):
        raise LorakitError(
            f"adapter name {name!r}: a name may not hold a path separator, a dot or a space; use '-' or '_'"
        )
    if hasattr(AdaptedWeight(Selection()), name):
        raise LorakitError(f"adapter name {name!r} is taken by torch.nn.Module; choose another")
    root = find_root(model)
    if root is not None and name in state_of(root).variants:
        raise LorakitError(
            f"an adapter named {name!r} is already resident: choose another name, or remove that one first"
        )
    return unwrapped(model) if root is None else root
