"""An adapter's updates for the weights of a checkpoint: names, shapes and values checked, in one error."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.checkpoints.checkpoint import Checkpoint, listed
from lorakit.checkpoints.seen import is_embedding, leaf, transposed
from lorakit.errors import LorakitError
from lorakit.layers import Kind, Parameter, Update, accumulation_dtype
from lorakit.loading import tensor_problem
from lorakit.storage import read_json_object
from lorakit.values.adapter import Adapter, check_known
from lorakit.values.placement import kind_of
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, Rows, Variant

_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|output|decoder)\.weight$")
"""What output heads are called."""
_WRITES_TEXT = re.compile(r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining")
"""Architectures of transformers that have an output head."""
TIED = "tied"
"""The fact that holds the weights whose change is meant for all that is tied to them, as a list of names."""
_PACKED = ("absmax", "SCB", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "weight_format")


class NeedsModel(LorakitError):
    """An adapter's weights are named otherwise in the checkpoint, or tied there: the live model may still take it."""


class Onto(NamedTuple):
    """What an adapter does to a checkpoint."""

    updates: Mapping[str, Update]
    """By the names of the checkpoint's weights."""
    prefix: str
    """What was added to the adapter's names ("+model."), or taken from them ("-base."); "" if they were those."""
    untied: tuple[str, ...]
    """Names that share their values with an adapted weight."""


def onto(adapter: Adapter, base: Checkpoint, *, check_values: bool) -> Onto:
    """The updates that an adapter has for a checkpoint.

    Raises:
        LorakitError: it does not fit; the message lists everything that is wrong. It is a `NeedsModel` if that is but
            names and ties.
    """
    check_known(adapter)
    if adapter.naming:
        raise LorakitError(
            f"{adapter.name!r} has names of {adapter.naming}, not those of parameters: give "
            "renamed_for(adapter, names) with the names of the checkpoint's parameters"
        )
    prefix, names = _names(adapter, base)
    kinds, problems, turned, ties = {}, _clashes(names), transposed(base), 0
    for weight, name in zip(adapter.weights, names, strict=True):
        tied = _tie_problems(adapter, weight, name, base)
        found, ties = _base_problems(weight, name, base, check_values) + tied, ties + len(tied)
        problems += [f"{weight.name!r}: {problem}" for problem in found]
        if not found:
            try:
                kinds[name] = _kind(weight, base[name].shape, turned)
            except LorakitError as error:
                problems.append(str(error))  # which names the weight
    usual = adapter.variant
    if kinds:
        usual = usual.fit([kind.matrix_shape(_outline(base, name)) for name, kind in kinds.items()])
    updates: dict[str, Update] = {}
    for weight, name in zip(adapter.weights, names, strict=True):
        if name in kinds:
            variant = usual if weight.variant == adapter.variant else weight.variant
            built, found = _built(weight, _undropped(variant), kinds[name], _outline(base, name), adapter.ours)
            problems += [f"{weight.name!r}: {problem}" for problem in found]
            if built is not None:
                updates[name] = built
    if problems:
        kind = NeedsModel if ties == len(problems) else LorakitError
        raise kind(listed(f"{adapter.name!r} does not fit {base.where}:", problems))
    untied = dict.fromkeys(other for name in updates for other in base.tied(name) if other not in updates)
    return Onto(updates, prefix, tuple(untied))


def _kind(weight: AdapterWeight, shape: tuple[int, ...], turned: Set[str]) -> Kind:
    """How the checkpoint's weight is seen; `turned` says which layers have (in, out), where the adapter does not."""
    if isinstance(weight.variant, Full) and len(shape) < 2:
        return Parameter(weight.entry.parameter)
    entry = weight.entry
    if entry.kind is None and entry.parameter == "weight" and len(shape) == 2 and leaf(entry.path) in turned:
        weight = weight._replace(entry=entry._replace(kind="TransposedLinear"))
    return kind_of(weight, shape)


def _outline(base: Checkpoint, name: str) -> Tensor:
    return torch.empty(base[name].shape, dtype=base[name].dtype, device="meta")


def _undropped(variant: Variant) -> Variant:
    """Without dropout, which acts in training alone and has no meaning in a weight."""
    return replace(variant, **{"dropout": 0.0}) if getattr(variant, "dropout", 0) > 0 else variant


def _names(adapter: Adapter, base: Checkpoint) -> tuple[str, list[str]]:
    """The adapter's weights under the checkpoint's names, with one prefix added or dropped if then all are there."""
    names = [weight.name for weight in adapter.weights]
    missing = [name for name in names if name not in base]
    if not missing:
        return "", names
    first, ways = names[0], {}
    for cut in (place.end() for place in re.finditer(r"\.", first)):
        dropped = first[:cut]
        if all(name.startswith(dropped) and name[cut:] in base for name in names):
            ways[f"-{dropped}"] = [name[cut:] for name in names]
    for longer in base:
        if longer.endswith(f".{first}"):
            added = longer[: -len(first)]
            if all(added + name in base for name in names):
                ways[f"+{added}"] = [added + name for name in names]
    if len(ways) == 1:
        return next(iter(ways.items()))
    if ways:
        raise LorakitError(
            f"{adapter.name!r} fits {base.where} in several ways, with a prefix added (+) or dropped (-): "
            f"{', '.join(ways)}; rename its weights to those that are meant"
        )
    raise NeedsModel(
        listed(
            f"{adapter.name!r} does not fit {base.where}, which lacks {len(missing)} of its {len(names)} weights:",
            [repr(name) + _absent(name, base) for name in missing],
        )
    )


def _absent(name: str, base: Checkpoint) -> str:
    """Why a weight may be missing."""
    stem = name.rpartition(".")[0]
    if f"{stem}.qweight" in base:
        return " (the checkpoint is quantized: it has qweight instead; take the one it was made of)"
    if name in base.aliases:
        return f" (it is tied to {base.aliases[name]!r} and stored once: merge into the live model, which unties it)"
    if _HEADS.search(name) and _ties(base):
        return " (config.json ties it to the embedding, stored once: merge into the live model, which unties it)"
    return ""


def _clashes(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [f"it has {name!r} twice" for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _base_problems(weight: AdapterWeight, name: str, base: Checkpoint, check_values: bool) -> list[str]:
    """How the checkpoint's weight differs from what the adapter was trained on."""
    stored, entry = base[name], weight.entry
    packed = [f"{name}.{word}" for word in _PACKED if f"{name}.{word}" in base]
    stem = name.rpartition(".")[0]
    packed += [
        f"{stem}.{word}" for word in ("SCB", "qweight", "weight_scale", "weight_scale_inv") if f"{stem}.{word}" in base
    ]
    if packed:
        return [f"the checkpoint has it quantized ({packed[0]}); merge into the one that it was made of"]
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
        return [f"the checkpoint has it as {stored.dtype}; only floats of 16 bits or more can take an update"]
    if entry.shape is not None and tuple(entry.shape) != stored.shape:
        return [f"it is {stored.shape} here and was {tuple(entry.shape)} when saved"]
    if not check_values or entry.sample is None:
        return []
    if entry.dtype != str(stored.dtype).removeprefix("torch.") and entry.dtype != str(stored.dtype):
        return [
            f"it is {stored.dtype} here and was {entry.dtype} when saved; if this is the same base in another dtype, "
            "use verify='off'"
        ]
    if base.fingerprint(name) != entry.sample:
        return ["it has other values than the base this adapter was trained on"]
    return []


def _tie_problems(adapter: Adapter, weight: AdapterWeight, name: str, base: Checkpoint) -> list[str]:
    """Whether changing it would change another weight that is not stored: an output head that is tied to it."""
    others = [alias for alias, kept in base.aliases.items() if kept == name]
    if isinstance(weight.variant, Rows) and not adapter.ours:
        return []  # PEFT trains such rows in all that is tied, and saves them once
    if not others and (weight.lookup or is_embedding(name)) and is_tied(name, base):
        others = ["the output head (config.json)"]
    tied = adapter.facts.get(TIED)
    if not others or (isinstance(tied, list) and weight.name in tied):
        return []
    return [f"it is stored once for {', '.join(others)} too, which would change with it; merge into the live model"]


def is_tied(name: str, base: Checkpoint) -> bool:
    """Whether an embedding is the output head too, as far as the checkpoint's config says."""
    return re.search(r"pos|wpe|type", name) is None and _ties(base)


def _ties(base: Checkpoint) -> bool:
    """Whether the model's own config ties an output head, which then is not stored, to the embedding."""
    if base.folder is None or any(_HEADS.search(name) for name in base):
        return False
    try:
        config = read_json_object(base.folder / "config.json")
    except LorakitError:
        return False
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    # transformers does not write what is its default, and for models with a head that is to tie.
    return any(_WRITES_TEXT.search(str(word)) for word in config.get("architectures") or ())


def _built(
    weight: AdapterWeight, variant: Variant, kind: Any, outline: Tensor, ours: bool
) -> tuple[Update | None, list[str]]:
    """The update of one weight with its tensors, or what stands against it."""
    try:
        sketch = variant.build(kind, outline, "weight")
    except LorakitError as error:
        return None, [str(error)]
    wanted = {name: tuple(tensor.shape) for name, tensor in sketch.saved().items()}
    problems = [
        problem
        for name, shape in wanted.items()
        if (problem := tensor_problem(name, weight.tensors.get(name), shape)) is not None
    ]
    problems += [f"{name!r} is no part of a {type(variant).__name__}" for name in weight.tensors if name not in wanted]
    if problems:
        return None, problems
    values = {
        name: tensor.detach().to("cpu", tensor.dtype if ours else accumulation_dtype(tensor.dtype))
        for name, tensor in weight.tensors.items()
    }
    if len({value.dtype for value in values.values()}) > 1:
        return None, ["its tensors are of several dtypes"]
    return sketch.restored(values), []
