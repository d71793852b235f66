"""The names of a model's weights, which names in files are resolved against."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorakit.checkpoints.opening import open_checkpoint
from lorakit.errors import LorakitError
from lorakit.index import Index
from lorakit.patterns import some
from lorakit.storage import read_json_object
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight


@dataclass(frozen=True)
class Names:
    """Names of parameters, from a live model, a checkpoint, or a list."""

    shapes: Mapping[str, tuple[int, ...] | None]
    """Parameter → its shape; None where it is not known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's config, as transformers has it: num_attention_heads and the like."""
    model: nn.Module | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> "Names":
        """The names in a live model."""
        index = Index(model)
        shapes: dict[str, tuple[int, ...] | None] = {}
        for name, (key, own) in index.parameters.items():
            parameter = index.modules[key]._parameters.get(own)
            shapes[name] = None if parameter is None else tuple(parameter.shape)
        config = getattr(model, "config", None)
        as_dict = getattr(config, "to_dict", None)
        return cls(
            shapes, as_dict() if as_dict is not None else dict(config) if isinstance(config, Mapping) else {}, model
        )

    @classmethod
    def of_list(cls, names: Iterable[str]) -> "Names":
        """Names of parameters, "model.layers.0.self_attn.q_proj.weight", or of layers."""
        return cls(
            {name if name.rpartition(".")[2] in ("weight", "bias") else f"{name}.weight": None for name in names}
        )

    @classmethod
    def of_checkpoint(cls, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> "Names":
        """The names in a checkpoint of any form, and the transformers config beside it.

        Raises:
            LorakitError: it is no checkpoint, or damaged.
        """
        checkpoint = open_checkpoint(source, "the checkpoint of names")
        config = None if checkpoint.folder is None else checkpoint.folder / "config.json"
        known = read_json_object(config) if config is not None and config.is_file() else {}
        return cls({name: tuple(stored.shape) for name, stored in checkpoint.tensors.items()}, known)

    @property
    def layers(self) -> list[str]:
        """The names of everything that has parameters."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.shapes))


def renamed(adapter: Adapter, paths: Mapping[str, str], problems: list[str], **changes: Any) -> Adapter:
    """The adapter with these layers' names in the place of its own.

    Raises:
        LorakitError: there are problems, which it lists; or two weights would be one.
    """
    weights: list[AdapterWeight] = []
    seen: dict[tuple[str, str], str] = {}
    for weight in adapter.weights:
        if weight.entry.path not in paths:
            continue
        entry = weight.entry._replace(path=paths[weight.entry.path])
        first = seen.setdefault((entry.path, entry.parameter), weight.name)
        if first != weight.name:
            problems.append(f"{first!r} and {weight.name!r} are both {entry.name!r}")
        weights.append(weight._replace(entry=entry))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"the names in {adapter.name!r} ({adapter.format}) do not fit the model:{listed}")
    return adapter.with_weights(weights, naming="", **changes)


def checked(adapter: Adapter, weights: Iterable[AdapterWeight], problems: list[str], **changes: Any) -> Adapter:
    """The adapter with these weights, under the names that a model has.

    Raises:
        LorakitError: there are problems, which it lists; or two weights would be one.
    """
    weights = tuple(weights)
    seen: set[str] = set()
    for weight in weights:
        if weight.name in seen:
            problems.append(f"two of its weights are {weight.name!r}")
        seen.add(weight.name)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{adapter.name!r} ({adapter.format}) does not fit the model:{listed}")
    return adapter.with_weights(weights, naming="", **changes)


def of_part(adapter: Adapter, names: Names, part: str | None) -> Adapter:
    """The part of an adapter of a pipeline that is about one of its models, by the names that it has there.

    An adapter of one model alone comes back as it is, unless only its names without the first word fit.

    Raises:
        LorakitError: it is about several models and it is not said which is meant, or not about this one.
    """
    parts: dict[str, list[AdapterWeight]] = {}
    for weight in adapter.weights:
        parts.setdefault(weight.entry.path.partition(".")[0], []).append(weight)
    layers = set(names.layers)
    if part is None:
        if not layers or any(weight.entry.path in layers for weight in adapter.weights):
            return adapter
        fitting = [p for p, mine in parts.items() if any(w.entry.path.partition(".")[2] in layers for w in mine)]
        if len(fitting) != 1:
            if len(parts) == 1 or not fitting:
                return adapter
            raise LorakitError(f"{adapter.name!r} is about {some(list(parts))}: say which is meant with part=...")
        part = fitting[0]
    elif part not in parts:
        raise LorakitError(f"{adapter.name!r} has no part {part!r}; it has {some(list(parts))}")
    others = tuple(f"{len(mine)} weights of {other!r}" for other, mine in parts.items() if other != part)
    mine = (w._replace(entry=w.entry._replace(path=w.entry.path.partition(".")[2])) for w in parts[part])
    return adapter.with_weights(mine, left_out=adapter.left_out + others, naming="")
