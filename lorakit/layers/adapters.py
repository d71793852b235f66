"""What a layer carries once it is adapted: its updates by adapter name.

An adapted layer gets one child module, `lora`, an `Adapters`: parameter name → `AdaptedWeight`: adapter name →
`Update`. The updates' tensors are ordinary parameters there, so `.to()`, optimizers, DDP and deepcopy see them. Which
updates act is read at every call from one `Selection` that the whole model shares; switching is a single write to it,
whatever the number of layers and of resident adapters.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from lorakit.layers.choice import Selection
from lorakit.layers.kind import Inputs, Kind, accumulation_dtype
from lorakit.layers.modules import begin, duplicate
from lorakit.layers.thin import Strength, Term

Mode = Literal["beside", "weight"]


class Update(nn.Module, ABC):
    """The tensors that one adapter trains for one weight, and what they do. Variants subclass it.

    Several that act on one weight are added up, each as it would change the base alone: W + Σ strength·ΔW. Calling one
    maps a weight W to W + ΔW, so any update can be given to `torch.nn.utils.parametrize.register_parametrization`.
    """

    kind: Kind
    """Which part of the weight it changes, and how that is seen: two updates of one weight may differ in it."""
    mode: Mode
    enabled: bool = True
    """Set it to False to have the base."""

    def __init__(self) -> None:
        begin(self)

    @abstractmethod
    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW, how the base weight changes, in its shape and in the update's dtype, of at least 32 bits."""

    @abstractmethod
    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        """The output y with strength times what this update adds to the layer's own output `base`."""

    def term(self, strength: Strength) -> Term | None:
        """The two factors and numbers that make up strength·ΔW, if ΔW is one product now; else None."""
        return None

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength·ΔW in the weight's dtype, or W itself when not enabled."""
        if not self.enabled:
            return weight
        wide = weight.to(accumulation_dtype(weight.dtype))
        return self.add_to(wide, weight, strength).to(weight.dtype)

    @final
    def add_to(self, total: Tensor, weight: Tensor, strength: Strength) -> Tensor:
        """Total + strength·ΔW of the base weight."""
        change = self.delta_weight(weight).to(total.dtype)
        return total + change * strength if isinstance(strength, Tensor) else torch.add(total, change, alpha=strength)

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of it, by the names of `Variant.file_names`."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors that `saved` gave, as they are: their dtype and device are kept."""
        for name, tensor in tensors.items():
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(tensor)
            else:
                setattr(self, name, tensor)
        self.place()

    @final
    def restored(self, tensors: Mapping[str, Tensor]) -> "Update":
        """Another update like this one, with the tensors that `saved` gave; the two share nothing that changes."""
        update = copy.deepcopy(self) if self._modules else cast(Update, duplicate(self))  # in a tenth of the time
        update.restore(tensors)
        return update

    def place(self) -> None:
        """Make anew what no file holds, where the other tensors now are. Called when they were moved or replaced."""

    @final
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Update":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.place()
        return self

    @final
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint without this adapter, one of the base say, loads with strict=True and leaves the adapter alone.
        # A checkpoint with a part of it is an error, as torch has it.
        # On `meta` there is nothing to leave alone: what a checkpoint lacks would never get values.
        if any(key.startswith(prefix) for key in state_dict) or any(p.is_meta for p in self.parameters()):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            self.place()


class _Children(nn.Module):
    """Child modules by name. Unlike `nn.ModuleDict` it has no method names, so a child may be called "keys"."""

    def __init__(self, training: bool = True) -> None:
        begin(self)["training"] = training

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

    selection: Selection
    place: int | None = None
    """Where the adapters' tables have the updates of this weight."""
    ready: Any = None
    """What calls with few rows found (`ready.Ready`); a copy finds its own."""

    def __init__(self, selection: Selection, training: bool = True) -> None:
        super().__init__(training)
        vars(self)["selection"] = selection

    def __getitem__(self, name: str) -> Update:
        return cast(Update, self._modules[name])

    def put(self, name: str, update: Update) -> None:
        """The adapter's update of this weight from now on."""
        self._modules[name] = update
        self.selection.enter(name, self)
        vars(self).pop("ready", None)

    def take(self, name: str) -> None:
        """Give up the adapter's update of this weight."""
        del self._modules[name]
        vars(self).pop("ready", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "ready"}

    def acting(self) -> list[tuple[Update, Strength]]:
        """The updates that act now, in the order of activation, each with its strength.

        This runs at every call of the layer.
        """
        selection, place = self.selection, self.place
        found: list[tuple[Update, Strength]] = []
        if selection.acting is None or place is None:  # a copy
            for name, strength in selection.active:
                if name in self._modules and self[name].enabled:
                    found.append((self[name], strength))
            return found
        compiling = torch.compiler.is_compiling()
        for i, (table, strength) in enumerate(selection.acting):
            update = table[place] if place < len(table) else None
            if update is not None and update.enabled:
                found.append((update, selection.strengths[i] if compiling else strength))
        return found

    def beside_kind(self) -> Kind:
        """The kind of the updates beside the call."""
        return next(self[name].kind for name in self if self[name].mode == "beside")

    def holds(self, mode: Mode) -> bool:
        """Whether any resident update acts in this mode."""
        return mode in [update.mode for update in self.updates()]

    def has_alike(self, update: Update) -> bool:
        """Whether another resident update reaches the layer's computation in the same way as this one."""
        mode, kind = update.mode, type(update.kind)
        return any(other.mode == mode and type(other.kind) is kind and other is not update for other in self.updates())

    def updates(self) -> Iterable[Update]:
        """Every resident update."""
        return cast(dict[str, Update], self._modules).values()


@final
class Adapters(_Children):
    """All that was added to one layer: parameter name → `AdaptedWeight`. It is the layer's child `lora`."""

    stands_in: bool = False
    """Whether the layer's forward is ours."""

    def __getitem__(self, parameter: str) -> AdaptedWeight:
        return cast(AdaptedWeight, self._modules[parameter])
