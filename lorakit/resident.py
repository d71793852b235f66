"""What is on a model: its adapters, their tensors, and which of them are trained."""

from dataclasses import dataclass

from torch import nn

from lorakit.state import find_root, require, sites, state_of
from lorakit.variants import Variant


@dataclass(frozen=True)
class Adapter:
    """One resident adapter."""

    variant: Variant
    weights: tuple[str, ...]
    """Names of the adapted parameters."""
    parameters: int
    """How many numbers it holds."""
    strength: float
    """The strength with which it acts now; 0 if it is not active."""
    trainable: bool


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The resident adapters by name, in the order in which they came; empty for a model without."""
    root = find_root(model)
    if root is None:
        return {}
    state = state_of(root)
    strengths = dict(state.selection.active)
    found = {}
    for name, variant in state.variants.items():
        mine = sites(root, name)
        tensors = [p for site in mine for p in site.adapted[name].parameters()]
        found[name] = Adapter(
            variant,
            tuple(site.name for site in mine),
            sum(p.numel() for p in tensors),
            strengths.get(name, 0.0),
            any(p.requires_grad for p in tensors),
        )
    return found


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trained tensors of one adapter, or of all: what an optimizer is given.

    Raises:
        LorakitError: the model has no adapter, or none of this name.
    """
    root, _ = require(model, None if name is None else [name])
    return [
        parameter
        for site in sites(root, name)
        for parameter in (site.adapted if name is None else site.adapted[name]).parameters()
    ]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Say whether an adapter is trained: sets `requires_grad` of its tensors, and of nothing else.

    Raises:
        LorakitError: there is no adapter of this name.
    """
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
