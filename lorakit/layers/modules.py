"""A module begun in a third of the time."""

from typing import Any

from torch import nn

_BARE = dict(vars(nn.Module()))
_CONTAINERS = [(name, type(value)) for name, value in _BARE.items() if isinstance(value, dict | list | set)]

_COPIED = (dict, list, set)


def begin(module: nn.Module) -> dict[str, Any]:
    """What `nn.Module.__init__` does; the module's `__dict__`, to put what it has to say of itself into.

    Adding an adapter makes three modules for each weight, and that is most of its work: torch sets each of their
    attributes by a call, and `nn.Module.__setattr__` asks of every further one whether it is a parameter, a buffer or
    a child. Attributes that are none of these are the same in `__dict__`, and a new parameter is in `_parameters`.
    """
    own = vars(module)
    own.update(_BARE)
    for name, make in _CONTAINERS:
        own[name] = make()
    return own


def duplicate(module: nn.Module) -> nn.Module:
    """The same but for its containers, which are copied; for a module without children.

    Parameters and buffers are shared.
    """
    twin = type(module).__new__(type(module))
    own = vars(twin)
    own.update(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, _COPIED):
            own[name] = value.copy()
    return twin
