"""cloneofsimo's `lora`, the first for Stable Diffusion: factors numbered in the order in which layers are found.

`unet:0:down` is of the first `nn.Linear` (or `nn.Conv2d`, where the factor has four axes) in modules of the classes
that the metadata lists; `.pt` files are a list, up, down, up, down, … without it. The scale is 1.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.form import Format, Known
from lorakit.formats.image import Parts, adapter_of, is_plain, weights_of
from lorakit.formats.names import Names, renamed
from lorakit.patterns import some
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight

_KEY = re.compile(r"(\w+):(\d{1,6}):(up|down)")
_LISTED = re.compile(r"\[(\d{1,6})\]")
_DEFAULT = ("CrossAttention", "Attention", "GEGLU", "CLIPAttention")
"""The classes that were searched in UNets and text encoders unless something else was said."""
_WITH_CONVOLUTIONS = (*_DEFAULT, "ResnetBlock2D")
_THEN = {"BasicTransformerBlock": ("attn1", "ff", "attn2")}
"""In which order diffusers once made the parts of a block; today `ff` comes last."""
_EMBEDDING = "<embed>"


def is_cloneofsimo(content: Content) -> bool:
    """Whether a key is a number with a direction, or the file a list of tensors."""
    return is_plain(content) and any(_KEY.fullmatch(key) or _LISTED.fullmatch(key) for key in content.tensors)


def read(content: Content, known: Known) -> Adapter:
    """The adapter, with numbers in the place of names: "unet:0"."""
    groups: dict[str, Parts] = {}
    problems: list[str] = []
    left_out: list[str] = []
    for key, tensor in content.tensors.items():
        found, listed = _KEY.fullmatch(key), _LISTED.fullmatch(key)
        if found is not None:
            path, up = f"{found[1]}:{int(found[2])}", found[3] == "up"
        elif listed is not None:
            path, up = f":{int(listed[1]) // 2}", int(listed[1]) % 2 == 0
        elif content.metadata.get(key) == _EMBEDDING:
            left_out.append(key)  # what a new word means: for the text encoder's table, no update of a weight
            continue
        else:
            problems.append(f"{key!r} is no part of such an adapter")
            continue
        role = "B" if up else "A"
        if role in groups.setdefault(path, {}):
            problems.append(f"{key!r} is there under another name, too")
        groups[path][role] = tensor
    parts = dict.fromkeys(path.partition(":")[0] for path in groups)
    classes = {part: _classes(content, part, problems) for part in parts}
    for part in parts:
        numbers = sorted(int(path.partition(":")[2]) for path in groups if path.partition(":")[0] == part)
        if numbers != list(range(len(numbers))):
            problems.append(f"of {part or 'the list'} it has {len(numbers)} numbers, not those from 0 on")
    more = {"format": "cloneofsimo", "naming": "cloneofsimo", "facts": {"cloneofsimo": classes}}
    return adapter_of(content, weights_of(groups, problems), problems, left_out=left_out, **more)


def _classes(content: Content, part: str, problems: list[str]) -> list[str] | None:
    """The classes of modules in which layers were searched; None if the file does not say."""
    text = content.metadata.get(part)
    if text is None:
        return None
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        problems.append(f"its metadata of {part!r} is no list of classes: {text[:80]!r}")
        return None
    return classes


def resolve(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The adapter of one model, with the names of its layers: those that the numbers meant then.

    Raises:
        LorakitError: the model is not there, it is not said which is meant, or layers' shapes are not the factors'.
    """
    if names.model is None:
        raise LorakitError(f"{adapter.name!r} numbers layers in the order of a model's classes: give the model itself")
    parts: dict[str, list[AdapterWeight]] = {}
    for weight in adapter.weights:
        parts.setdefault(weight.entry.path.partition(":")[0], []).append(weight)
    part = known.part if known.part is not None else next(iter(parts)) if len(parts) == 1 else None
    if part is not None and "" in parts and part not in parts:
        part = ""  # a list, which does not say what it is of
    tries = {each: _layers_of(adapter, each, mine, names.model) for each, mine in parts.items()}
    if part is None:
        fitting = [each for each, (_, problems) in tries.items() if not problems]
        if len(fitting) != 1:
            raise LorakitError(f"{adapter.name!r} is about {some(list(parts))}: say which is meant with part=...")
        part = fitting[0]
    if part not in parts:
        raise LorakitError(f"{adapter.name!r} has no part {part!r}; it has {some(list(parts))}")
    found, problems = tries[part]
    others = tuple(f"{len(mine)} weights of {other!r}" for other, mine in parts.items() if other != part)
    merged, left_out = _without_repeats(adapter, parts[part], found, problems), adapter.left_out + others
    return renamed(merged, found, problems, left_out=left_out)


def _layers_of(
    adapter: Adapter, part: str, mine: Sequence[AdapterWeight], model: nn.Module
) -> tuple[dict[str, str], list[str]]:
    """Numbered path → layer, and what does not fit: in the order of the model, or in that of then if that fits."""
    stored = adapter.facts.get("cloneofsimo", {}).get(part)
    convolutions = any(weight.tensors["A"].dim() == 4 for weight in mine)
    classes = stored or (_WITH_CONVOLUTIONS if convolutions else _DEFAULT)
    ordered = sorted(mine, key=lambda weight: int(weight.entry.path.partition(":")[2]))
    now, then = (_matched(ordered, _found(model, frozenset(classes), order), classes) for order in ({}, _THEN))
    return then if now[1] and not then[1] else now


def _matched(
    weights: Sequence[AdapterWeight], layers: Iterator[tuple[str, nn.Module]], classes: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Each pair of factors belongs to the next layer of its number of axes."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for weight in weights:
        A, B = weight.tensors["A"], weight.tensors["B"]
        layer = next((each for each in layers if each[1].weight.dim() == A.dim()), None)  # type: ignore[operator]
        if layer is None:
            problems.append(f"{weight.entry.path!r} is beyond the layers in modules of {some(sorted(classes))}")
            continue
        name, module = layer
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        if shape != (B.shape[0], *A.shape[1:]):
            wanted = (B.shape[0], *A.shape[1:])
            problems.append(f"{weight.entry.path!r} is for a weight {wanted}, and in its place is {name!r} {shape}")
        found[weight.entry.path] = name
    over = [name for name, module in layers if module.weight.dim() == 2]  # type: ignore[operator]
    if over and not problems:
        problems.append(f"it ends before {some(over)}, which lie in modules of these classes, too")
    return found, problems


def _found(
    model: nn.Module, classes: frozenset[str], order: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions in modules of these classes, as often as they have such a module above them."""
    for above, ancestor in _walk(model, "", order, set()):
        if type(ancestor).__name__ in classes:
            for name, module in _walk(ancestor, above, order, set()):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    yield name, module


def _walk(
    module: nn.Module, name: str, order: Mapping[str, Sequence[str]], seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, with the children of some classes in another order."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    first = order.get(type(module).__name__, ())
    children = dict(module.named_children())
    sequence = [own for own in first if own in children] + [own for own in children if own not in first]
    for own in sequence:
        if own != "lora":
            yield from _walk(children[own], f"{name}.{own}" if name else own, order, seen)


def _without_repeats(
    adapter: Adapter, mine: Sequence[AdapterWeight], found: Mapping[str, str], problems: list[str]
) -> Adapter:
    """A layer in two modules of the classes, one in the other, is numbered twice, with the same factors."""
    kept: dict[str, AdapterWeight] = {}
    for weight in mine:
        layer = found.get(weight.entry.path)
        if layer is None:
            continue
        first = kept.setdefault(layer, weight)
        if first is not weight and not _equal(first.tensors, weight.tensors):
            problems.append(f"{first.entry.path!r} and {weight.entry.path!r} are both {layer!r}, and not the same")
    return adapter.with_weights(kept.values())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and bool((one[key] == other[key]).all()) for key in one
    )


CLONEOFSIMO = Format(
    "cloneofsimo", "cloneofsimo's lora", is_cloneofsimo, read, takes=("part",), resolve={"cloneofsimo": resolve}
)
