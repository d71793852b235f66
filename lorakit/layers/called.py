"""What runs at every call of a layer that has updates beside it.

A plain linear layer gets a forward of its own, as an attribute of the layer: its output and the update are then one
computation (`thin.adapted_linear`), at a third of what a hook costs, and code that calls `layer.forward` itself is
reached too. Any other layer computes as it always does, and a forward hook adds to its output.
"""

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.adapters import AdaptedWeight, Adapters, Update
from lorakit.layers.kind import STAND_INS, CalledKind, Inputs, base_weight, in_dtype
from lorakit.layers.linear import Linear
from lorakit.layers.ready import Ready
from lorakit.layers.rows import by_row
from lorakit.layers.severed import guarded
from lorakit.layers.thin import Strength, Term, adapted_linear, add_thin_product, is_plain


def watch(layer: nn.Module, adapters: Adapters) -> None:
    """Have the updates beside this layer act at its calls."""
    if len(adapters) == 1 and "weight" in adapters and _is_plain_linear(layer, adapters["weight"]):
        vars(layer)["forward"] = partial(linear_forward, layer, adapters["weight"])
        vars(adapters)["stands_in"] = True
        # torch's fused transformer layers read weights past any forward; a hook on a module below keeps them from it.
        adapters._forward_hooks[0] = _never_called
    else:
        layer.register_forward_hook(_beside, prepend=True, with_kwargs=True)


def unwatch(layer: nn.Module, adapters: Adapters) -> None:
    """Take that off again."""
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _beside]:
        del layer._forward_hooks[key]
        layer._forward_hooks_with_kwargs.pop(key, None)
    if has_our_forward(layer):
        del vars(layer)["forward"]
        vars(adapters)["stands_in"] = False
        adapters._forward_hooks.clear()


def _never_called(*_: Any) -> None:
    """A hook of a module that is never called."""


def has_our_forward(layer: nn.Module) -> bool:
    """Whether the layer's forward is the one from here."""
    return getattr(vars(layer).get("forward"), "func", None) is linear_forward


def _is_plain_linear(layer: nn.Module, adapted: AdaptedWeight) -> bool:
    return (
        "forward" not in vars(layer)
        and not hasattr(type(layer), "weight")  # a property
        and not hasattr(type(layer), "bias")
        and layer._parameters.get("weight") is not None
        and "bias" in layer._parameters
        and all(type(update.kind) is Linear and update.mode == "beside" for update in adapted.updates())
    )


def linear_forward(layer: nn.Module, adapted: AdaptedWeight, input: Tensor) -> Tensor:
    """The forward of a plain linear layer with updates beside it; input: (..., in), result: (..., out)."""
    own = layer._parameters  # an attribute of a module is found ten times slower
    weight: Any = own.get("weight")
    bias: Any = own.get("bias")
    if weight is None or "bias" not in own:  # something computes them since: torch's parametrize, say
        weight, bias = layer.weight, layer.bias
    if adapted.selection.rows is None and is_plain(input, weight):
        ready: Ready | None = adapted.ready
        if ready is None or not ready.holds(adapted):
            ready = vars(adapted)["ready"] = Ready(adapted)
        few = ready.apply(input, weight, bias)
        if few is not None:
            return few
    acting = adapted.acting()
    if acting and adapted.selection.rows is None:
        update, strength = acting[0]
        term = update.term(strength)
        others = [other.term(strength) for other, strength in acting[1:]]
        if term is not None and None not in others:
            y = adapted_linear(input, weight, bias, term)
            for term in others:
                y = add_thin_product(y, input, cast(Term, term))
            return y
    if adapted.selection.rows is not None:
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        frozen = None if trains or type(weight) is not nn.Parameter else weight
        base = F.linear(input, weight, bias)
        return by_row(layer, adapted, (input,), base, base, frozen)
    base = F.linear(input, weight, bias)
    return cast(Tensor, _added(layer, adapted, acting, (input,), base, base))


def _beside(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: the layer's output with every acting update added."""
    y = output
    for adapted in cast(dict[str, AdaptedWeight], cast(Adapters, layer._modules["lora"])._modules).values():
        acting = adapted.acting()
        beside = [each for each in acting if each[0].mode == "beside"]
        if not beside and (adapted.selection.rows is None or not adapted.holds("beside")):
            continue
        kind = cast(CalledKind, beside[0][0].kind if beside else adapted.beside_kind())
        inputs = args if args and not kwargs else _inputs(kind, args, kwargs)
        if kind.may_sever and y is output:
            y = output = guarded(layer, inputs, output)
        inside = [each for each in acting if each[0].mode == "weight"]
        base = _base_output(layer, kind, inside, inputs, output) if inside else output
        y = _added(layer, adapted, beside, inputs, base, y)
    return y


STAND_INS.add(linear_forward)


def _added(
    layer: nn.Module,
    adapted: AdaptedWeight,
    beside: list[tuple[Update, Strength]],
    inputs: Inputs,
    base: Any,
    y: Any,
) -> Any:
    """The output y with what each row's adapter, or every acting update, adds to the layer's own output `base`."""
    if adapted.selection.rows is not None:
        y = by_row(layer, adapted, inputs, base, y)
    for update, strength in beside:
        y = update.beside(layer, inputs, base, y, strength)
    return y


def _base_output(
    layer: nn.Module, kind: CalledKind, inside: list[tuple[Update, Strength]], inputs: Inputs, output: Any
) -> Any:
    """What the layer returned, less what updates in the same weight gave to it: each is defined on the base alone."""
    base = output
    for update, strength in inside:
        delta = update.delta_weight(base_weight(layer, kind.parameter))
        change = kind.call(layer, in_dtype(kind, inputs, delta.dtype), output, delta)
        base = base - (change * strength).to(base.dtype)
    return base


def _inputs(kind: CalledKind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What the layer was called with, in the order of forward's arguments."""
    if not kwargs or not kind.arguments:
        return args or tuple(kwargs.values())
    return args + tuple(kwargs.get(name) for name in kind.arguments[len(args) :])
