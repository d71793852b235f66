"""What a layer carries once it is adapted: its updates by adapter name, and the model's choice among them.

An adapted layer gets one child module, `lora`, an `Adapters`: parameter name → `AdaptedWeight`: adapter name →
`Update`. The updates' tensors are ordinary parameters there, so `.to()`, optimizers, DDP and deepcopy see them. Which
updates act is read at every call from one `Selection` that the whole model shares; switching is a single write to it,
whatever the number of layers and of resident adapters.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, final

from torch import Tensor, nn

from lorakit.layers.kind import Inputs, Kind

Mode = Literal["beside", "weight"]


@final
@dataclass
class Selection:
    """The adapters that act now, each with its strength. One object per model, shared by all its layers."""

    active: tuple[tuple[str, float], ...] = ()


class Update(nn.Module, ABC):
    """The tensors that one adapter trains for one weight, and what they do. Variants subclass it.

    Calling it maps a weight W to the adapted weight, so any update can be given to
    `torch.nn.utils.parametrize.register_parametrization`.
    """

    kind: Kind
    """Which part of the weight it changes, and how that is seen: two updates of one weight may differ in it."""
    mode: Mode

    @abstractmethod
    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The adapted weight, in the weight's shape and dtype."""

    @abstractmethod
    def beside(self, layer: nn.Module, inputs: Inputs, y: Tensor, strength: float) -> Tensor:
        """The adapted output, for the layer's inputs and its unadapted output y."""

    @final
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint without this adapter, one of the base say, loads with strict=True and leaves the adapter alone.
        # A checkpoint with a part of it is an error, as torch has it.
        # On `meta` there is nothing to leave alone: what a checkpoint lacks would never get values.
        if any(key.startswith(prefix) for key in state_dict) or any(p.is_meta for p in self.parameters()):
            super()._load_from_state_dict(state_dict, prefix, *rest)


class _Children(nn.Module):
    """Child modules by name. Unlike `nn.ModuleDict` it has no method names, so a child may be called "keys"."""

    def __getitem__(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@final
class AdaptedWeight(_Children):
    """The updates of one weight: adapter name → `Update`."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection

    def __getitem__(self, name: str) -> Update:
        return cast(Update, self._modules[name])

    def acting(self, mode: Mode) -> Iterator[tuple[Update, float]]:
        """The updates that act now in this mode, in the order of activation, each with its strength."""
        for name, strength in self.selection.active:
            update = self._modules.get(name)
            if update is not None and update.mode == mode:
                yield cast(Update, update), strength

    def holds(self, mode: Mode) -> bool:
        """Whether any resident update acts in this mode."""
        return any(self[name].mode == mode for name in self)


@final
class Adapters(_Children):
    """All that was added to one layer: parameter name → `AdaptedWeight`. It is the layer's child `lora`."""

    def __getitem__(self, parameter: str) -> AdaptedWeight:
        return cast(AdaptedWeight, self._modules[parameter])
