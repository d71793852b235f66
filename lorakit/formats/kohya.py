"""The layout of sd-scripts, LyCORIS and OneTrainer: names with underscores for dots, after a model's prefix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.flattened import fitting_names
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.image import ROLES, Parts, adapter_of, is_plain, weights_of
from lorakit.formats.image_writing import alpha_tensor, dropped, safetensors_of, tensors_of
from lorakit.formats.names import Names, renamed
from lorakit.patterns import some
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight

PREFIXES: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lycoris_": "",
}
"""What a name begins with, and the model of a pipeline that this means; LyCORIS alone does not say it."""
_BUNDLED = "bundle_emb."


def _split(stem: str) -> tuple[str, str] | None:
    """The prefix of a name and the rest."""
    prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
    return None if prefix is None else (prefix, stem.removeprefix(prefix))


def is_kohya(content: Content) -> bool:
    """Whether a name of the file has one of the prefixes."""
    return is_plain(content) and any(_split(key.partition(".")[0]) is not None for key in content.tensors)


def read(content: Content, known: Known) -> Adapter:
    """The adapter, with flattened names."""
    groups: dict[str, Parts] = {}
    problems: list[str] = []
    left_out: list[str] = []
    for key, tensor in content.tensors.items():
        stem, _, end = key.partition(".")
        if key.startswith(_BUNDLED):  # token embeddings that OneTrainer trains beside: no update of a weight
            left_out.append(key)
        elif _split(stem) is None:
            problems.append(f"{key!r} has none of the prefixes {', '.join(PREFIXES)}")
        elif end not in ROLES:
            problems.append(f"{key!r} is a part that outputs depend on and that cannot be held here")
        elif ROLES[end] in groups.setdefault(stem, {}):
            problems.append(f"{key!r} is there under another name, too")
        else:
            groups[stem][ROLES[end]] = tensor
    weights = weights_of(groups, problems)
    dtypes = {str(parts["alpha"].dtype).removeprefix("torch.") for parts in groups.values() if "alpha" in parts}
    facts = {
        "metadata": {key: value for key, value in content.metadata.items() if key != "format"},
        "alpha": dtypes.pop() if len(dtypes) == 1 else None,
    }
    more = {"format": "kohya", "naming": "kohya", "facts": {"kohya": facts}, "left_out": left_out}
    return adapter_of(content, weights, problems, **more)


def resolve(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The adapter of one model, with the names of its layers.

    Raises:
        LorakitError: names that fit none, or several, all in one error; or it is not said which model is meant.
    """
    parts: dict[str, dict[str, AdapterWeight]] = {}
    for weight in adapter.weights:
        prefix, rest = _split(weight.entry.path) or ("", weight.entry.path)
        parts.setdefault(prefix, {})[rest] = weight
    prefix = _prefix(adapter, parts, names, known.part)
    mine, problems = parts[prefix], list[str]()
    found = fitting_names(mine, names, problems)
    paths = {mine[rest].entry.path: name for rest, name in found.items()}
    others = tuple(f"{len(each)} weights of {other}" for other, each in parts.items() if other != prefix)
    facts = {**adapter.facts, "kohya": {**adapter.facts.get("kohya", {}), "prefix": prefix}}
    return renamed(adapter, paths, problems, left_out=adapter.left_out + others, facts=facts)


def _prefix(adapter: Adapter, parts: Mapping[str, Mapping[str, AdapterWeight]], names: Names, part: str | None) -> str:
    """The prefix of the weights that are meant."""
    if part is not None:
        wanted = _prefixes_of(part)
        found = [prefix for prefix in parts if prefix in wanted]
    elif len(parts) == 1:
        return next(iter(parts))
    else:
        found = [prefix for prefix, mine in parts.items() if fitting_names(mine, names, [])]
    if len(found) == 1:
        return found[0]
    has = some([f"{prefix} ({PREFIXES.get(prefix) or 'any model'})" for prefix in parts])
    if part is not None and not found:
        raise LorakitError(f"{adapter.name!r} has no part {part!r}; it has {has}")
    raise LorakitError(f"{adapter.name!r} is about {has}: say which is meant with part=...")


def _prefixes_of(part: str) -> list[str]:
    """What a part may begin with: a model by diffusers' names, or the prefix itself. A transformer may be a "unet"."""
    if f"{part.rstrip('_')}_" in PREFIXES:
        return [f"{part.rstrip('_')}_"]
    found = [prefix for prefix, model in PREFIXES.items() if model == part]
    return [*found, "lora_unet_"] if part == "transformer" else found


def write(adapter: Adapter, known: Known) -> Written:
    """One `.safetensors` file; the prefix is that of `part`, or of the file it came from.

    Raises:
        LorakitError: what the format cannot hold, or it is not known which model it is of.
    """
    facts = adapter.facts.get("kohya", {})
    prefix = ""
    if adapter.naming != "kohya":
        prefix = _prefix_to_write(adapter, facts, known.part)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for weight in adapter.weights:
        stem = prefix + weight.entry.path.replace(".", "_") if prefix else weight.entry.path
        first = owners.setdefault(stem, weight.name)
        if first != weight.name:
            problems.append(f"{first!r} and {weight.name!r} are both {stem!r} once flattened")
        found = tensors_of(weight, "kohya", problems)
        if found is not None:
            parts, alpha = found
            kept = getattr(torch, facts.get("alpha") or "", None)
            dtype = next(iter(parts.values())).dtype
            parts["alpha"] = alpha_tensor(alpha, kept if isinstance(kept, torch.dtype) else dtype)
            tensors |= {f"{stem}.{end}": tensor for end, tensor in parts.items()}
    no_place("kohya", problems)
    metadata = {k: v for k, v in facts.get("metadata", {}).items() if isinstance(v, str)}
    return Written(safetensors_of(adapter.name, tensors, metadata or _metadata(adapter)), dropped(adapter))


def _prefix_to_write(adapter: Adapter, facts: Mapping[str, object], part: str | None) -> str:
    if adapter.naming not in ("", "parts"):
        raise LorakitError(f"{adapter.name!r} has the names of {adapter.format}: name the model's layers first")
    if part is None and isinstance(facts.get("prefix"), str) and facts["prefix"] in PREFIXES:
        return str(facts["prefix"])
    found = [] if part is None else _prefixes_of(part)
    if not found:
        models = ", ".join(dict.fromkeys(model for model in PREFIXES.values() if model))
        raise LorakitError(
            f"writing {adapter.name!r} as kohya needs part=..., which model it is of: {models}; or a prefix itself "
            f"({', '.join(PREFIXES)})"
        )
    return found[0]


def _metadata(adapter: Adapter) -> dict[str, str]:
    """What sd-scripts writes of the network; others show it."""
    variant = adapter.variant
    rank, alpha = getattr(variant, "rank", None), getattr(variant, "alpha", None)
    if rank is None:
        return {}
    known = {"ss_network_dim": rank, "ss_network_alpha": alpha or rank}
    return {**{key: str(value) for key, value in known.items()}, "ss_network_module": "networks.lora"}


KOHYA = Format(
    "kohya",
    "sd-scripts, LyCORIS and OneTrainer",
    is_kohya,
    read,
    write,
    takes=("part",),
    asks=("part",),
    resolve={"kohya": resolve},
)
