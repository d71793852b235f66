"""Which modules and parameters of a model a pattern selects."""

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lorakit.errors import LorakitError
from lorakit.index import Index
from lorakit.layers import parameter_names

Pattern = str | re.Pattern[str] | type | Callable[[str, nn.Module], bool]
Targets = Pattern | Sequence[Pattern]


def patterns_of(given: Targets, argument: str) -> list[Pattern]:
    """The patterns in an argument, each checked to be one."""
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


def by_name(pattern: Pattern) -> Callable[[str], bool] | None:
    """A test of dotted names; None for a pattern that looks at modules."""
    if isinstance(pattern, re.Pattern):
        return lambda name: pattern.search(name) is not None
    if not isinstance(pattern, str):
        return None
    if is_glob(pattern):
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith("." + pattern)


def is_glob(pattern: Pattern) -> bool:
    """Whether it is a text with wildcards."""
    return isinstance(pattern, str) and any(sign in pattern for sign in "*?[")


def matches(index: Index, pattern: Pattern) -> list[tuple[int, str | None]]:
    """What a pattern selects: (module, None) for a layer, (module, parameter) for a parameter. Never empty."""
    named, linear = by_name(pattern), isinstance(pattern, str) and pattern == "all-linear"
    found: list[tuple[int, str | None]] = []
    for key, module in index.modules.items():
        if linear:
            kinds = index.kinds[key]
            hit = (kinds and any(kind.is_linear for kind in kinds)) or _may_be_linear(index, module)
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


def _may_be_linear(index: Index, module: nn.Module) -> bool:
    """Of a scripted module no type is left, only parameters."""
    return id(module) in index.scripted and any(p.dim() == 2 for p in module.parameters(recurse=False))


def _no_match(index: Index, pattern: Pattern) -> LorakitError:
    adaptable = [index.names[key][0] or "(model)" for key, kinds in index.kinds.items() if kinds]
    if pattern == "all-linear":
        kinds = sorted({type(module).__name__ for module in index.modules.values() if has_parameters(module)})
        return LorakitError(
            f"no linear layer in this {type(index.model).__name__}; its layers with weights: "
            f"{', '.join(kinds) or 'none'}; name parameters instead: {some(list(index.parameters))}"
        )
    if not isinstance(pattern, str):
        shown = pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "__name__", pattern)
        lost = "; of scripted modules the types are lost" if index.scripted and isinstance(pattern, type) else ""
        return LorakitError(
            f"the target {shown!r} matches nothing{lost}; layers that can be adapted: {some(adaptable)}"
        )
    known = [name for names in index.names.values() for name in names if name] + list(index.parameters)
    tails = {name.split(".", i)[-1]: None for name in known for i in range(name.count(".") + 1)}
    near = difflib.get_close_matches(pattern, [*known, *tails], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    return LorakitError(
        f"the target {pattern!r} matches nothing; {hint or f'layers that can be adapted: {some(adaptable)}'}"
    )


def some(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"


def has_parameters(module: nn.Module) -> bool:
    """Whether the module has a parameter of its own."""
    return any(True for _ in parameter_names(module))
