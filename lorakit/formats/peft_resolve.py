"""What the live model says about a file of PEFT: which parameters its factors are of, and what its base was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.form import Known
from lorakit.formats.names import Names
from lorakit.formats.peft_keys import ADDEND, BASE, PARAMETER
from lorakit.layers import Parameter as ParameterKind
from lorakit.layers import TransposedLinear, kinds_of
from lorakit.peft.fields import own_variant
from lorakit.peft.layout import WRAPPED, stacked
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import LowRank


def resolve_parameters(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The adapter with each weight as the model has it.

    Raises:
        LorakitError: there is no model, or something does not fit it: all of it in one error.
    """
    if names.model is None:
        raise LorakitError(
            f"{adapter.name!r} has target_parameters, lora_bias or a copy of base weights, which only the live model "
            "gives a meaning: give the model in the place of names"
        )
    modules = dict(names.model.named_modules(remove_duplicate=False))
    facts = dict(adapter.facts)
    config = facts.pop("unresolved")
    problems: list[str] = []
    weights, left_out = [], []
    wrapped = _wrapped(config, modules)
    for weight in adapter.weights:
        try:
            if weight.entry.kind == PARAMETER:
                weights.append(_of_parameter(weight, adapter, config, modules, wrapped))
            elif weight.entry.kind == ADDEND:
                weights.append(_of_bias(weight, modules))
            elif weight.entry.kind == BASE:
                left_out.append(_of_base(weight, modules))
            else:
                weights.append(weight)
        except LorakitError as error:
            problems.append(str(error))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{adapter.name!r} ({adapter.format}) does not fit this model:{listed}")
    left = adapter.left_out + tuple(left_out)
    return adapter.with_weights(weights, naming="", facts=facts, left_out=left)


def _wrapped(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The parameters that PEFT wraps in each module, in the order in which it does: that of their declaration."""
    targets = config.get("target_parameters") or []
    found = {}
    for path, module in modules.items():
        matching = [
            own
            for own, parameter in module._parameters.items()
            if parameter is not None and any(f"{path}.{own}" == t or f"{path}.{own}".endswith(f".{t}") for t in targets)
        ]
        if matching and path:
            found[path] = matching
    return found


def _module(path: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    if path not in modules:
        raise LorakitError(f"the model has no layer {path!r}")
    return modules[path]


def _of_parameter(
    weight: AdapterWeight,
    adapter: Adapter,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    wrapped: Mapping[str, list[str]],
) -> AdapterWeight:
    entry = weight.entry
    path = entry.path.replace(WRAPPED, "")
    depth = entry.path.count(WRAPPED)
    module = _module(path, modules)
    own = wrapped.get(path, [])
    if not own and not depth:  # a layer of that name, whose own weight it is
        return weight._replace(entry=entry._replace(kind=None))
    if depth >= len(own):
        raise LorakitError(f"{entry.path!r} is one of more than the {len(own)} parameters that target_parameters names")
    parameter = own[len(own) - 1 - depth]  # the first lies deepest
    shape = tuple(module._parameters[parameter].shape)  # type: ignore[union-attr]
    variant = own_variant(adapter.variant, config, f"{path}.{parameter}", Path(adapter.name)) or adapter.variant
    A, B = weight.tensors["A"], weight.tensors["B"]
    transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    if len(shape) not in (2, 3):
        raise LorakitError(
            f"'{path}.{parameter}' has {len(shape)} axes here, and PEFT adapts parameters of two or three"
        )
    if transposed and shape[0] == 1:
        raise LorakitError(f"'{path}.{parameter}' is a stack of one transposed matrix, which PEFT turns round")
    try:
        A, B = stacked(A, B, shape[0], transposed) if len(shape) == 3 else (A, B)
    except LorakitError as error:
        raise LorakitError(f"'{path}.{parameter}': {error}") from None
    rank = variant.rank if isinstance(variant, LowRank) else None
    if not A.shape[-2] == B.shape[-1] == rank or (*B.shape[:-1], A.shape[-1]) != shape:
        raise LorakitError(
            f"'{path}.{parameter}' of shape {shape} has no factors of rank {rank} such as A {tuple(A.shape)} and "
            f"B {tuple(B.shape)}"
        )
    kind = next((kind for kind in kinds_of(module) if kind.parameter == parameter and not kind.slices), None)
    if kind is not None and not isinstance(kind, ParameterKind):  # the layer's own weight, seen as the layer sees it
        if kind.matrix_shape(torch.empty(shape, device="meta")) not in (shape, shape[::-1]) or len(shape) != 2:
            raise LorakitError(f"'{path}.{parameter}' is the weight of a {kind.name}, which PEFT sees otherwise")
        if kind.lookup or isinstance(kind, TransposedLinear):
            A, B = B.mT.contiguous(), A.mT.contiguous()
        own_entry = entry._replace(path=path, variant=None if variant == adapter.variant else variant)
        return AdapterWeight(own_entry._replace(kind=type(kind).__name__), variant, {"A": A, "B": B})
    order = [name for name, value in module._parameters.items() if value is not None].index(parameter)
    placed = entry._replace(
        path=path,
        parameter=parameter,
        kind=ParameterKind.__name__,
        shape=shape,
        variant=None if variant == adapter.variant else variant,
        order=order,
        transposed=transposed,
    )
    return AdapterWeight(placed, variant, {"A": A, "B": B})


def _of_bias(weight: AdapterWeight, modules: Mapping[str, nn.Module]) -> AdapterWeight:
    """The bias itself: what the layer has and s·b."""
    entry, added = weight.entry, weight.tensors["value"]
    bias = _module(entry.path, modules)._parameters.get("bias")
    if bias is None:
        raise LorakitError(f"{entry.path!r} has no bias here, and the file adds one (lora_bias)")
    if bias.shape != added.shape or bias.is_meta:
        raise LorakitError(f"{entry.name!r} is {tuple(bias.shape)} here and {tuple(added.shape)} in the file")
    value = bias.detach().cpu().float() + added
    return weight._replace(entry=entry._replace(kind=None), tensors={"value": value})


def _of_base(weight: AdapterWeight, modules: Mapping[str, nn.Module]) -> str:
    """What to say of a base weight that was saved along: it is no part of the adapter, if the base has the same."""
    entry, saved = weight.entry, weight.tensors["value"]
    layer: Any = _module(entry.path, modules)
    kept = layer._parameters.get("weight")
    if kept is None or kept.shape != saved.shape:
        what = "no weight" if kept is None else f"a weight of shape {tuple(kept.shape)}"
        raise LorakitError(
            f"{entry.path!r} has {what} here, and the file a copy of its base weight, {tuple(saved.shape)}"
        )
    if not kept.dtype.is_floating_point:
        raise LorakitError(f"{entry.name!r} is quantized here: whether it is the copy in the file cannot be told")
    if not _equal(kept.detach().cpu(), saved):
        raise LorakitError(
            f"{entry.name!r} has other values than the copy of the base in the file: that is another base, or one that "
            "was changed before training"
        )
    return f"a copy of the base weight {entry.name!r}, which has the same values here"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal, or one of them is the other in fewer bits."""
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))
