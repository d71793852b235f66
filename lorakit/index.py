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
                self.names[key] = []
                self.modules[key] = module
                self.kinds[key] = kinds_of(module)
                self.read |= {
                    id(part) for own in parts_of(module).read if (part := module._modules.get(own)) is not None
                }
            self.names[key].append(name)
            if self.scripted or isinstance(module, torch.jit.ScriptModule):
                self._note_scripted(name, module)
            for own in parameter_names(module):
                full = join(name, own)
                self.parameters[full] = (key, own)
                if key not in self.scripted:
                    self.sharing.setdefault(id(module._parameters.get(own)), []).append(full)
            for kind in self.kinds[key]:
                for own in kind.names if isinstance(kind, Slices) else ():
                    self.parameters[join(name, own)] = (key, own)

    def foreign(self, key: int) -> Foreign | None:
        """The kind of a layer that is foreign."""
        return next((kind for kind in self.kinds[key] if isinstance(kind, Foreign)), None)

    def tied(self, module: nn.Module, parameter: str) -> tuple[str, ...]:
        """The other owners' names for the same weight."""
        if module._parameters.get(parameter) is None:
            return ()
        mine = {join(name, parameter) for name in self.names[id(module)]}
        return tuple(name for name in self.sharing[id(module._parameters[parameter])] if name not in mine)

    def _note_scripted(self, name: str, module: nn.Module) -> None:
        parent = self.ids.get(name.rpartition(".")[0]) if name else None
        if parent in self.scripted:
            self.scripted[id(module)] = self.scripted[parent]
        elif isinstance(module, torch.jit.ScriptModule):
            self.scripted[id(module)] = name
