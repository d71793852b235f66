"""What is on a model: its adapters, their tensors, and which of them are trained."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.errors import LorakitError
from lorakit.state import find_root, require, sites, state_of
from lorakit.variants import Variant
from lorakit.variants.checks import checked_number


@dataclass(frozen=True)
class Resident:
    """One resident adapter."""

    variant: Variant
    weights: tuple[str, ...]
    """Names of the adapted parameters."""
    parameters: int
    """How many numbers it holds."""
    strength: float
    """The strength with which it acts now; 0 if it is not active."""
    trainable: bool


def adapters(model: nn.Module) -> dict[str, Resident]:
    """The resident adapters by name, in the order in which they came; empty for a model without."""
    root = find_root(model)
    if root is None:
        return {}
    state = state_of(root)
    strengths = dict(state.selection.active)
    everywhere = sites(root)
    found = {}
    for name, variant in state.variants.items():
        mine = [site for site in everywhere if name in site.adapted]
        tensors = [p for site in mine for p in site.adapted[name].parameters()]
        found[name] = Resident(
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


def adapter_parameter_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, name: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which B learns faster than A: LoRA+ (Hayou et al. 2024, arXiv:2402.12354).

    Args:
        model: the model that was given to `attach`.
        lr: the learning rate of all but B.
        ratio: the learning rate of B is ratio·lr. (Of an embedding A begins at zero and B does not, and both have lr.)
        name: the adapter; by default all.
        **options: further options of the groups, such as weight_decay.

    Raises:
        LorakitError: no such adapter, no B in it, or a number that is not above 0.

    Example:
        >>> optimizer = torch.optim.AdamW(adapter_parameter_groups(model, lr=1e-4, ratio=16))
    """
    lr, ratio = checked_number("lr", lr, above=0), checked_number("ratio", ratio, above=0)
    root, _ = require(model, None if name is None else [name])
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for site in sites(root, name):
        for update in [site.adapted[each] for each in site.adapted if name in (None, each)]:
            for key, parameter in update.named_parameters():
                (fast if key == "B" and not update.kind.lookup else slow).append(parameter)
    if not fast:
        raise LorakitError("no adapter here has a factor B, whose learning rate this is about; use adapter_parameters")
    return [{"params": slow, "lr": lr, **options}, {"params": fast, "lr": ratio * lr, **options}]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Say whether an adapter is trained: sets `requires_grad` of its tensors, and of nothing else.

    Raises:
        LorakitError: there is no adapter of this name.
    """
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
