"""The modules and parameters of a model, by identity and by name."""

import torch
from torch import nn

from lorakit.layers import Foreign, Kind, Slices, kinds_of, parameter_names, parts_of
from lorakit.state import join, layers_of


class Index:
    """Every module, parameter and slice of a model, from one walk over it. Good until the model changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, list[str]] = {}
        self.ids: dict[str, int] = {}
        self.modules: dict[int, nn.Module] = {}
        self.kinds: dict[int, tuple[Kind, ...]] = {}
        """What can be adapted of each module as a whole."""
        self.parameters: dict[str, tuple[int, str]] = {}  # full name, also of a slice -> (the owner's id, its own name)
        self.sharing: dict[int, list[str]] = {}  # id of a parameter -> every name it has
        self.read: set[int] = set()
        """Layers whose weight another layer's code reads past their call, on some of its paths at least."""
        self.scripted: dict[int, str] = {}
        """Modules that are scripted or lie in one that is -> the name of that one."""
        for name, module in layers_of(model):
            key = id(module)
            self.ids[name] = key
            if key not in self.modules:
                self._meet(key, module)
            self.names[key].append(name)
            if self.scripted or isinstance(module, torch.jit.ScriptModule):
                self._note_scripted(name, module)
            self._note_parameters(f"{name}." if name else "", key, module)

    def _meet(self, key: int, module: nn.Module) -> None:
        self.names[key] = []
        self.modules[key] = module
        self.kinds[key] = kinds_of(module)
        for own in parts_of(module).read:
            if (part := module._modules.get(own)) is not None:
                self.read.add(id(part))

    def _note_parameters(self, prefix: str, key: int, module: nn.Module) -> None:
        scripted = key in self.scripted
        for own in parameter_names(module):
            full = prefix + own
            self.parameters[full] = (key, own)
            if not scripted:
                self.sharing.setdefault(id(module._parameters.get(own)), []).append(full)
        for kind in self.kinds[key]:
            if type(kind) is Slices:
                for own in kind.names:
                    self.parameters[prefix + own] = (key, own)

    def foreign(self, key: int) -> Foreign | None:
        """The kind of a layer that is foreign."""
        return next((kind for kind in self.kinds[key] if isinstance(kind, Foreign)), None)

    def tied(self, module: nn.Module, parameter: str) -> tuple[str, ...]:
        """The other owners' names for the same weight."""
        weight = module._parameters.get(parameter)
        names = () if weight is None else self.sharing[id(weight)]
        if len(names) < 2:
            return ()
        mine = {join(name, parameter) for name in self.names[id(module)]}
        return tuple(name for name in names if name not in mine)

    def _note_scripted(self, name: str, module: nn.Module) -> None:
        parent = self.ids.get(name.rpartition(".")[0]) if name else None
        if parent in self.scripted:
            self.scripted[id(module)] = self.scripted[parent]
        elif isinstance(module, torch.jit.ScriptModule):
            self.scripted[id(module)] = name
