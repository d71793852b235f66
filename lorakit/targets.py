"""Which weights of a model are meant by `targets`, and how an update can act there.

A pattern is "all-linear"; a name, whole or its last parts ("q_proj"); a glob ("encoder.*.q_proj"); a compiled regex
(searched); a type; or a function (name, module) -> bool. A name that is a parameter's selects that parameter. Every
pattern must match something, or it is an error that names the nearest real names.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import CalledKind, Foreign, Kind, Mode, Parameter, base_weight, dense_weight, kind_of, outline
from lorakit.state import join, layers_of
from lorakit.suitable import check_weight, only_called, only_read

Pattern = str | re.Pattern[str] | type | Callable[[str, nn.Module], bool]
Targets = Pattern | Sequence[Pattern]
RequestedMode = Literal["auto", "beside", "weight"]


@dataclass(frozen=True)
class Place:
    """A weight to adapt."""

    names: tuple[str, ...]
    """The layer's names in the model: more than one for a shared module."""
    layer: nn.Module
    kind: Kind
    mode: Mode
    tied: tuple[str, ...]
    """Other names under which the model reaches the very same weight."""

    @property
    def path(self) -> str:
        """The layer's first name."""
        return self.names[0]

    @property
    def parameter(self) -> str:
        """The full name of the weight."""
        return join(self.path, self.kind.parameter)

    @property
    def label(self) -> str:
        """What a person calls it: the layer if the update sits beside its call, else the parameter."""
        return self.path or "(model)" if self.mode == "beside" else self.parameter

    @property
    def weight(self) -> Tensor:
        """The values of the weight, dequantized if it is quantized."""
        return dense_weight(self.layer, self.kind)

    @property
    def outline(self) -> Tensor:
        """The weight's shape, dtype and device; its values only where they can be had for nothing."""
        return outline(self.layer, self.kind)


def resolve(model: nn.Module, targets: Targets, exclude: Targets | None, mode: RequestedMode) -> list[Place]:
    """The weights that `targets` without `exclude` selects, in the model's order, each once. Changes nothing."""
    if mode not in ("auto", "beside", "weight"):
        raise LorakitError(f"mode={mode!r} must be 'auto', 'beside' or 'weight'")
    index = Index(model)
    out = _Excluded(index, _patterns(exclude, "exclude") if exclude is not None else [])
    chosen: dict[tuple[int, str], Place] = {}
    for pattern in _patterns(targets, "targets"):
        for module, parameter in _matches(index, pattern):
            if out.has(module, parameter):
                continue
            place = _place(index, module, parameter, mode, pattern)
            if place is None or out.has(module, place.kind.parameter):
                continue
            before = chosen.setdefault((module, place.kind.parameter), place)
            if before.mode != place.mode:
                raise LorakitError(
                    f"{place.parameter!r} is selected twice, as a layer and as a parameter: name it once"
                )
    if not chosen:
        raise LorakitError(f"targets={targets!r} with exclude={exclude!r} leaves nothing to adapt")
    order = {module: i for i, module in enumerate(index.modules)}
    return [chosen[key] for key in sorted(chosen, key=lambda key: order[key[0]])]


def selected(model: nn.Module, pattern: Pattern, places: Sequence[Place]) -> list[int]:
    """Which of the places a pattern selects, by its module or by its parameter."""
    matches = _Excluded(Index(model), [pattern])
    return [i for i, place in enumerate(places) if matches.has(id(place.layer), place.kind.parameter)]


def wholes(model: nn.Module, patterns: Targets) -> list[Place]:
    """Every parameter that the patterns name, and every one in the modules that they name; in the weight."""
    index = Index(model)
    places: dict[tuple[int, str], Place] = {}
    for pattern in _patterns(patterns, "train_also"):
        for key, parameter in _matches(index, pattern):
            below = [("", index.modules[key])] if parameter is not None else layers_of(index.modules[key])
            for module in {id(module): module for _, module in below}.values():
                for own in [parameter] if parameter is not None else list(_parameter_names(module)):
                    kind = _kind_of_parameter(module, own, whole=True)
                    places[id(module), own] = _placed(index, id(module), kind, "weight", whole=True)
    if not places:
        raise LorakitError(f"train_also={patterns!r} selects no parameter")
    return list(places.values())


def place_of(index: "Index", path: str, parameter: str, mode: Mode | None, whole: bool = False) -> Place:
    """The weight of this layer and name, as a file gives them; `mode` as it was adapted, if that is known.

    If it is trained as a whole it need not be a matrix.

    Raises:
        LorakitError: the model has no such weight, or it cannot be adapted so.
    """
    key = index.ids.get(path)
    if key is None:
        raise LorakitError(f"the model has no layer {path!r}")
    layer = index.modules[key]
    own = kind_of(layer)
    foreign = isinstance(own, Foreign) and own.parameter == parameter  # it need not be a parameter
    if not foreign and parameter not in _parameter_names(layer):
        raise LorakitError(f"the model has no parameter {join(path, parameter)!r}")
    kind = own if foreign and mode != "weight" else _kind_of_parameter(layer, parameter, whole)
    return _placed(index, key, cast(Kind, kind), mode or ("weight" if whole else "auto"), whole)


def _kind_of_parameter(layer: nn.Module, parameter: str, whole: bool = False) -> Kind:
    """The layer's own kind for its own weight, where it can be read; for any other parameter the general one."""
    kind = kind_of(layer)
    own = kind is not None and kind.parameter == parameter and not isinstance(kind, Foreign)
    return cast(Kind, kind) if own else Parameter(parameter, flat=whole)


class Index:
    """The modules and parameters of a model, by identity and by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, list[str]] = {}
        self.ids: dict[str, int] = {}
        self.modules: dict[int, nn.Module] = {}
        self.parameters: dict[str, tuple[int, str]] = {}  # full name -> (the owner's id, its own name)
        self.sharing: dict[int, list[str]] = {}  # id of a parameter -> every name it has
        for name, module in layers_of(model):
            self.names.setdefault(id(module), []).append(name)
            self.ids[name] = id(module)
            self.modules[id(module)] = module
            for own in _parameter_names(module):
                self.parameters[join(name, own)] = (id(module), own)
                self.sharing.setdefault(id(module._parameters.get(own)), []).append(join(name, own))

    def tied(self, module: nn.Module, parameter: str) -> tuple[str, ...]:
        """The other owners' names for the same weight."""
        if module._parameters.get(parameter) is None:
            return ()
        mine = {join(name, parameter) for name in self.names[id(module)]}
        return tuple(name for name in self.sharing[id(module._parameters[parameter])] if name not in mine)


class _Excluded:
    """What `exclude` names: parameters, and modules with everything below them."""

    def __init__(self, index: Index, patterns: list[Pattern]) -> None:
        self.matches: set[tuple[int, str | None]] = set()
        for pattern in patterns:
            for key, parameter in _matches(index, pattern):
                below = layers_of(index.modules[key]) if parameter is None else [("", index.modules[key])]
                self.matches |= {(id(module), parameter) for _, module in below}

    def has(self, module: int, parameter: str | None) -> bool:
        return (module, None) in self.matches or (module, parameter) in self.matches


def _parameter_names(module: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    if "parametrizations" in module._modules:  # by torch: the parameter is a property of the class
        yield from module._modules["parametrizations"]._modules  # type: ignore[union-attr]


def _patterns(given: Targets, argument: str) -> list[Pattern]:
    patterns = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    if not patterns:
        raise LorakitError(f"{argument} is empty: name at least one layer, or use 'all-linear'")
    for pattern in patterns:
        if not (isinstance(pattern, str | re.Pattern | type) or callable(pattern)) or pattern == "":
            raise LorakitError(
                f"{argument} holds {pattern!r}: a target is a name, a glob, a compiled regex, a type or a function "
                "(name, module) -> bool"
            )
    return patterns  # type: ignore[return-value]


def _by_name(pattern: Pattern) -> Callable[[str], bool] | None:
    """A test of dotted names; None for a pattern that looks at modules."""
    if isinstance(pattern, re.Pattern):
        return lambda name: pattern.search(name) is not None
    if not isinstance(pattern, str):
        return None
    if _is_glob(pattern):
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith("." + pattern)


def _is_glob(pattern: Pattern) -> bool:
    return isinstance(pattern, str) and any(sign in pattern for sign in "*?[")


def _matches(index: Index, pattern: Pattern) -> list[tuple[int, str | None]]:
    """What a pattern selects: (module, None) for a layer, (module, parameter) for a parameter. Never empty."""
    named = _by_name(pattern)
    found: list[tuple[int, str | None]] = []
    for key, module in index.modules.items():
        if pattern == "all-linear":
            kind = kind_of(module)
            hit = kind is not None and kind.is_linear
        elif named is not None:
            hit = any(named(name) for name in index.names[key] if name)
        elif isinstance(pattern, type):
            hit = isinstance(module, pattern)
        else:
            hit = any(pattern(name, module) for name in index.names[key])  # type: ignore[operator]
        if hit:
            found.append((key, None))
    if not found and named is not None:
        found = list(dict.fromkeys(owner for name, owner in index.parameters.items() if named(name)))
    if not found:
        raise _no_match(index, pattern)
    return found


def _no_match(index: Index, pattern: Pattern) -> LorakitError:
    adaptable = [index.names[key][0] or "(model)" for key, module in index.modules.items() if kind_of(module)]
    if pattern == "all-linear":
        kinds = sorted({type(module).__name__ for module in index.modules.values() if _has_parameters(module)})
        return LorakitError(
            f"no linear layer in this {type(index.model).__name__}; its layers with weights: "
            f"{', '.join(kinds) or 'none'}; name parameters instead: {_some(list(index.parameters))}"
        )
    if not isinstance(pattern, str):
        shown = pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "__name__", pattern)
        return LorakitError(f"the target {shown!r} matches nothing; layers that can be adapted: {_some(adaptable)}")
    known = [name for names in index.names.values() for name in names if name] + list(index.parameters)
    tails = {name.split(".", i)[-1]: None for name in known for i in range(name.count(".") + 1)}
    near = difflib.get_close_matches(pattern, [*known, *tails], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    return LorakitError(
        f"the target {pattern!r} matches nothing; {hint or f'layers that can be adapted: {_some(adaptable)}'}"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in _parameter_names(module))


def _place(index: Index, key: int, parameter: str | None, mode: RequestedMode, pattern: Pattern) -> Place | None:
    """How the selected weight is adapted; None if a broad pattern met a module with no weight of its own."""
    module = index.modules[key]
    names = tuple(index.names[key])
    if parameter is not None:
        if mode == "beside":
            raise only_read(join(names[0], parameter))
        return _placed(index, key, _kind_of_parameter(module, parameter), "weight")
    kind = kind_of(module)
    if kind is None:
        broad = _is_glob(pattern) or not isinstance(pattern, str | type)
        if broad and not _has_parameters(module):
            return None
        raise _not_adaptable(index, module, names[0])
    return _placed(index, key, kind, mode)


def _placed(index: Index, key: int, kind: Kind, mode: RequestedMode, whole: bool = False) -> Place:
    """The weight of a known kind, checked to be one that can be adapted in this mode."""
    module, names = index.modules[key], tuple(index.names[key])
    if mode == "beside" and not isinstance(kind, CalledKind):
        raise only_read(join(names[0], kind.parameter))
    if mode == "weight" and isinstance(kind, Foreign):
        raise only_called(module, kind, join(names[0], kind.parameter))
    called = isinstance(kind, CalledKind) and mode != "weight"
    check_weight(module, kind, names[0], whole)
    settled = module._parameters.get(kind.parameter) is not None or hasattr(type(module), kind.parameter)
    if not called and not settled:
        raise LorakitError(
            f"cannot adapt {join(names[0], kind.parameter)!r} in the weight: it is no parameter, something sets it "
            "before each call (an old weight_norm, say); use torch.nn.utils.parametrizations instead"
        )
    return Place(names, module, kind, "beside" if called else "weight", index.tied(module, kind.parameter))


def _not_adaptable(index: Index, module: nn.Module, name: str) -> LorakitError:
    what = f"cannot adapt {type(module).__name__} at {name or '(model)'!r}"
    own = [join(name, own) for own in _parameter_names(module)]
    matrices = [n for n in own if base_weight(module, index.parameters[n][1]).dim() >= 2]
    if matrices:
        return LorakitError(f"{what} as a whole; name its parameters ({_some(matrices)}), or exclude it")
    if own:
        return LorakitError(f"{what}: it has no weight of two axes or more; exclude it, or name other layers")
    below = [join(name, n) for n, m in layers_of(module) if n and kind_of(m)]
    if below:
        return LorakitError(f"{what}: it only holds other layers; name those, such as {_some(below)}")
    return LorakitError(f"{what}: it has no weight; name a layer that has one, or a parameter")
