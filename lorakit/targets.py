"""Which weights of a model are meant by `targets`, and how an update can act there.

A pattern is "all-linear"; a name, whole or its last parts ("q_proj"); a glob ("encoder.*.q_proj"); a compiled regex
(searched); a type; or a function (name, module) -> bool. A name that is a parameter's selects that parameter. Every
pattern must match something, or it is an error that names the nearest real names.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.index import Index
from lorakit.layers import (
    CalledKind,
    Foreign,
    Kind,
    Mode,
    Parameter,
    Slices,
    base_weight,
    dense_weight,
    outline,
    parameter_names,
    parts_of,
)
from lorakit.patterns import Pattern, Targets, has_parameters, is_glob, matches, patterns_of, some
from lorakit.state import join, layers_of
from lorakit.suitable import check_weight, only_called, only_read

RequestedMode = Literal["auto", "beside", "weight"]


class Place(NamedTuple):
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


def resolve(index: Index, targets: Targets, exclude: Targets | None, mode: RequestedMode) -> list[Place]:
    """The weights that `targets` without `exclude` selects, in the model's order, each once. Changes nothing."""
    if mode not in ("auto", "beside", "weight"):
        raise LorakitError(f"mode={mode!r} must be 'auto', 'beside' or 'weight'")
    out = _Excluded(index, patterns_of(exclude, "exclude") if exclude is not None else [])
    chosen: dict[tuple[int, str], Place] = {}
    for pattern in patterns_of(targets, "targets"):
        for module, parameter in matches(index, pattern):
            for place in _places(index, module, parameter, mode, pattern, out):
                kind = out.left_of(place)
                if kind is not None:
                    _choose(chosen, place if kind is place.kind else place._replace(kind=kind))
    if not chosen:
        raise LorakitError(f"targets={targets!r} with exclude={exclude!r} leaves nothing to adapt")
    order = {module: i for i, module in enumerate(index.modules)}
    return [chosen[key] for key in sorted(chosen, key=lambda key: order[key[0]])]


def _choose(chosen: dict[tuple[int, str], Place], place: Place) -> None:
    """Add a place to those that were chosen: slices of one parameter join, anything else is the same or an error."""
    key = (id(place.layer), place.kind.parameter)
    before = chosen.get(key, place)
    if isinstance(before.kind, Slices) and isinstance(place.kind, Slices):
        place = place._replace(kind=place.kind.only({*before.kind.slices, *place.kind.slices}))
    elif before is not place and (before.kind != place.kind or before.mode != place.mode):
        how = "as a whole and by its slices" if before.kind != place.kind else "as a layer and as a parameter"
        raise LorakitError(f"{place.parameter!r} is selected twice, {how}: name it once")
    chosen[key] = place


def selected(index: Index, pattern: Pattern, places: Sequence[Place]) -> list[int]:
    """Which of the places a pattern selects, by its module or by its parameter."""
    chosen = _Excluded(index, [pattern])
    return [i for i, place in enumerate(places) if chosen.has(id(place.layer), place.kind.parameter)]


def wholes(index: Index, patterns: Targets) -> list[Place]:
    """Every parameter that the patterns name, and every one in the modules that they name; in the weight."""
    places: dict[tuple[int, str], Place] = {}
    for pattern in patterns_of(patterns, "train_also"):
        for key, parameter in matches(index, pattern):
            below = [("", index.modules[key])] if parameter is not None else layers_of(index.modules[key])
            for module in {id(module): module for _, module in below}.values():
                if id(module) in index.scripted and has_parameters(module):
                    raise _scripted(index, id(module))
                for own in [parameter] if parameter is not None else list(parameter_names(module)):
                    kind = _kind_named(index, id(module), own, whole=True)
                    if kind.slices:
                        raise LorakitError(f"{own!r} is a slice of {kind.parameter!r}, which is trained whole or not")
                    places[id(module), own] = _placed(index, id(module), kind, "weight", whole=True)
    if not places:
        raise LorakitError(f"train_also={patterns!r} selects no parameter")
    return list(places.values())


def place_of(
    index: Index, path: str, parameter: str, mode: Mode | None, whole: bool = False, slices: tuple[str, ...] = ()
) -> Place:
    """The weight of this layer and name, as a file gives them; `mode` as it was adapted, if that is known.

    If it is trained as a whole it need not be a matrix.

    Raises:
        LorakitError: the model has no such weight, or it cannot be adapted so.
    """
    key = index.ids.get(path)
    if key is None:
        raise LorakitError(f"the model has no layer {path!r}")
    if key in index.scripted:
        raise _scripted(index, key)
    layer = index.modules[key]
    foreign = index.foreign(key)
    if foreign is not None and (foreign.parameter != parameter or mode == "weight"):
        foreign = None
    if foreign is None and parameter not in parameter_names(layer):  # what is foreign need not be a parameter
        raise LorakitError(f"the model has no parameter {join(path, parameter)!r}")
    kind = foreign or _kind_named(index, key, parameter, whole)
    if slices:
        sliced = next((k for k in index.kinds[key] if isinstance(k, Slices) and k.parameter == parameter), None)
        if sliced is None or sliced.only(set(slices)).slices != slices:
            raise LorakitError(f"{join(path, parameter)!r} has no slices {', '.join(slices)} here, in this order")
        kind = sliced.only(set(slices))
    return _placed(index, key, kind, mode or ("weight" if whole else "auto"), whole)


def _kind_named(index: Index, key: int, name: str, whole: bool = False) -> Kind:
    """The layer's own kind for its own weight, if it can be read, or for a slice; for any other the general one."""
    for kind in index.kinds[key]:
        if isinstance(kind, Slices):
            if name in kind.names:
                return kind.only({name})
        elif kind.parameter == name and not isinstance(kind, Foreign):
            return kind
    return Parameter(name, flat=whole)


class _Excluded:
    """What `exclude` names: parameters, and modules with everything below them."""

    def __init__(self, index: Index, patterns: list[Pattern]) -> None:
        self.index = index
        self.matches: set[tuple[int, str | None]] = set()
        for pattern in patterns:
            for key, parameter in matches(index, pattern):
                below = layers_of(index.modules[key]) if parameter is None else [("", index.modules[key])]
                self.matches |= {(id(module), parameter) for _, module in below}

    def has(self, module: int, parameter: str | None) -> bool:
        return (module, None) in self.matches or (module, parameter) in self.matches

    def left_of(self, place: Place) -> Kind | None:
        """What is left to adapt of this weight; None if nothing."""
        key, kind = id(place.layer), place.kind
        if not self.matches:
            return kind
        if self.has(key, kind.parameter):
            return None
        for whole in self.index.kinds[key]:
            gone = {name for name in whole.slices if (key, name) in self.matches}
            if not gone or whole.parameter != kind.parameter:
                continue
            if not isinstance(kind, Slices):
                raise LorakitError(
                    f"{place.parameter!r} is named as a whole, and {', '.join(sorted(gone))} is excluded from it: name "
                    "the slices that are to be adapted"
                )
            kind = kind.only(set(kind.slices) - gone)
        return None if isinstance(kind, Slices) and not kind.slices else kind


def _places(
    index: Index, key: int, name: str | None, mode: RequestedMode, pattern: Pattern, out: _Excluded
) -> Iterator[Place]:
    """How what was selected is adapted: all of a layer, or what has this name in it."""
    if out.has(key, name):
        return
    module, path = index.modules[key], index.names[key][0]
    if key in index.scripted:
        raise _scripted(index, key)
    if name is not None:
        if mode == "beside":
            raise only_read(join(path, name))
        yield _placed(index, key, _kind_named(index, key, name), "weight")
        return
    linear_only = pattern == "all-linear"
    kinds = [kind for kind in index.kinds[key] if kind.is_linear or not linear_only]
    parts = [] if linear_only else [module._modules[part] for part in parts_of(module).named if part in module._modules]
    if not kinds and not parts:
        broad = is_glob(pattern) or not isinstance(pattern, str | type)
        if not broad or has_parameters(module):
            raise _not_adaptable(index, module, path)
    for kind in kinds:
        yield _placed(index, key, kind, mode)
    for part in parts:
        if part is not None and any(True for _ in part.parameters()):
            yield from _places(index, id(part), None, mode, pattern, out)


def _placed(index: Index, key: int, kind: Kind, mode: RequestedMode, whole: bool = False) -> Place:
    """The weight of a known kind, checked to be one that can be adapted in this mode."""
    module, names = index.modules[key], tuple(index.names[key])
    if mode == "beside" and not isinstance(kind, CalledKind):
        raise only_read(join(names[0], kind.parameter))
    if mode == "weight" and isinstance(kind, Foreign):
        raise only_called(module, kind, join(names[0], kind.parameter))
    called = isinstance(kind, CalledKind) and mode != "weight" and not (mode == "auto" and key in index.read)
    check_weight(module, kind, names[0], whole)
    settled = module._parameters.get(kind.parameter) is not None or hasattr(type(module), kind.parameter)
    if not called and not settled:
        raise LorakitError(
            f"cannot adapt {join(names[0], kind.parameter)!r} in the weight: it is no parameter, something sets it "
            "before each call (an old weight_norm, say); use torch.nn.utils.parametrizations instead"
        )
    return Place(names, module, kind, "beside" if called else "weight", index.tied(module, kind.parameter))


def _scripted(index: Index, key: int) -> LorakitError:
    name, script = index.names[key][0], index.scripted[key]
    where = "it is a scripted module" if name == script else f"it is in the scripted module {script or '(model)'!r}"
    return LorakitError(
        f"cannot adapt {name or '(model)'!r}: {where}, whose compiled code sees no hook and no computed weight; "
        "adapt the module that it was made from and merge before scripting it, or exclude it"
    )


def _not_adaptable(index: Index, module: nn.Module, name: str) -> LorakitError:
    what = f"cannot adapt {type(module).__name__} at {name or '(model)'!r}"
    own = [join(name, own) for own in parameter_names(module)]
    matrices = [n for n in own if base_weight(module, index.parameters[n][1]).dim() >= 2]
    if matrices:
        return LorakitError(f"{what} as a whole; name its parameters ({some(matrices)}), or exclude it")
    if own:
        sizes = ", ".join(f"{n!r} is {tuple(p.shape)}" for n, p in module.named_parameters(name, recurse=False))
        others = [index.names[key][0] for key, kinds in index.kinds.items() if kinds]
        return LorakitError(
            f"{what}: it has no weight of two axes or more ({sizes}), and a vector has no low-rank update; exclude it, "
            f"or name layers such as {some(others)}"
        )
    below = [join(name, n) for n, m in layers_of(module) if n and (index.kinds[id(m)] or parts_of(m).named)]
    if below:
        return LorakitError(f"{what}: it only holds other layers; name those, such as {some(below)}")
    return LorakitError(f"{what}: it has no weight; name a layer that has one, or a parameter")
