"""How updates reach a layer's computation: a forward hook for *beside*, a property of its class for *in the weight*.

In the weight, the layer's class becomes a subclass in which the parameter's name is a property: reading it gives the
adapted weight, while the parameter itself stays where it was, under its own key in `_parameters`. That is the idea of
`torch.nn.utils.parametrize` without moving the parameter to `parametrizations.<name>.original`: keys, order and
storage of `state_dict()` and `named_parameters()` do not change, a base checkpoint still loads, the module still
pickles, and RNNs, which keep a list of their weights, are covered.
"""

from functools import cache, partial
from typing import Any, cast

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers.adapters import AdaptedWeight, Adapters, Update
from lorakit.layers.kind import CalledKind, Inputs, accumulation_dtype, in_dtype
from lorakit.layers.rows import by_row
from lorakit.layers.severed import guarded


class _Hooked(dict[str, Any]):
    """The parameters of a layer that has our hook.

    Code that `torch.compile` made before the hook came would go on without it: compiled code checks no hooks. But it
    does check the type of this mapping, and so it is left when the hook comes or goes, and taken up again later.
    """


def adapters_of(layer: nn.Module) -> Adapters | None:
    """What is installed on the layer, if anything."""
    if "lora" not in layer._modules:  # a scripted module's mapping has no `get`
        return None
    lora = layer._modules["lora"]
    return lora if isinstance(lora, Adapters) else None


def install(layer: nn.Module, adapters: Adapters) -> None:
    """Make `adapters` act on the layer; also to be called after its contents have changed."""
    uninstall(layer)
    layer.add_module("lora", adapters)
    if any(adapters[parameter].holds("beside") for parameter in adapters):
        layer.register_forward_hook(_beside, prepend=True, with_kwargs=True)
        if type(layer._parameters) is dict:
            layer._parameters = _Hooked(layer._parameters)
    names = tuple(sorted(parameter for parameter in adapters if adapters[parameter].holds("weight")))
    if names:
        layer.__class__ = _reading_class(cast(Any, type(layer)), names)


def check_changeable(layer: nn.Module) -> None:
    """Whether adapters can be put on this layer and taken off.

    Raises:
        LorakitError: its class was changed after it was adapted in the weight.
    """
    cls = type(layer)
    if hasattr(cls, "_read_by_lorakit") and "_read_by_lorakit" not in vars(cls):
        raise LorakitError(
            f"cannot change the adapters of a {cls.__name__}: its class was changed after attaching (by fully_shard, "
            "say); do this before that"
        )


def uninstall(layer: nn.Module) -> Adapters | None:
    """Take everything off the layer and hand it back; the layer is then as it came."""
    check_changeable(layer)
    adapters = adapters_of(layer)
    if adapters is None:
        return None
    reading = "_read_by_lorakit" in vars(type(layer))
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _beside]:
        del layer._forward_hooks[key]
        layer._forward_hooks_with_kwargs.pop(key, None)
    if isinstance(layer._parameters, _Hooked):
        layer._parameters = dict(layer._parameters)
    if reading:
        layer.__class__ = type(layer).__bases__[0]
        if isinstance(layer, nn.RNNBase):
            layer._flat_weights = _flat_weights(layer)
    del layer._modules["lora"]
    return adapters


def base_weight(layer: nn.Module, parameter: str) -> Tensor:
    """The frozen weight itself, past any update."""
    weight = layer._parameters.get(parameter)
    if weight is not None:
        return weight
    # Not a plain parameter: a property of the layer's own class, by torch's parametrize for instance.
    for owner in type(layer).__mro__:
        if parameter in vars(owner).get("_read_by_lorakit", ()):
            return cast(Tensor, getattr(super(owner, layer), parameter))
    return cast(Tensor, getattr(layer, parameter))


def _beside(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: the layer's output with every acting update added."""
    y = output
    for adapted in cast(dict[str, AdaptedWeight], cast(Adapters, layer._modules["lora"])._modules).values():
        beside, weight = adapted.acting()
        by_rows = adapted.selection.rows is not None and adapted.holds("beside")
        if not beside and not by_rows:
            continue
        kind = cast(CalledKind, beside[0][0].kind if beside else adapted.beside_kind())
        inputs = args if args and not kwargs else _inputs(kind, args, kwargs)
        if kind.may_sever and y is output:
            y = output = guarded(layer, inputs, output)
        if by_rows:
            y = by_row(layer, kind, adapted, inputs, output, y)
        base = _base_output(layer, kind, weight, inputs, output) if weight else output
        for update, strength in beside:
            y = update.beside(layer, inputs, base, y, strength)
    return y


def _base_output(
    layer: nn.Module, kind: CalledKind, weight: list[tuple[Update, float]], inputs: Inputs, output: Any
) -> Any:
    """What the layer returned, less what updates in the same weight gave to it: each is defined on the base alone."""
    base = output
    for update, strength in weight:
        delta = update.delta_weight(base_weight(layer, kind.parameter))
        change = kind.call(layer, in_dtype(kind, inputs, delta.dtype), output, delta)
        base = base - (change * strength).to(base.dtype)
    return base


def _inputs(kind: CalledKind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What the layer was called with, in the order of forward's arguments."""
    if not kwargs or not kind.arguments:
        return args or tuple(kwargs.values())
    return args + tuple(kwargs.get(name) for name in kind.arguments[len(args) :])


def adapted_weight(weight: Tensor, adapted: AdaptedWeight) -> Tensor:
    """The weight with every update that acts in it. With none it is the very same object."""
    result = weight
    for update, strength in adapted.acting()[1]:
        if result is weight:
            result = weight.to(accumulation_dtype(weight.dtype))  # rounded once, after the last update
        result = update.add_to(result, weight, strength)
    return result.to(weight.dtype)


def _read(layer: nn.Module, parameter: str) -> Tensor:
    """The getter of an adapted parameter."""
    try:
        weight = base_weight(layer, parameter)
        if type(weight) is not nn.Parameter and "_is_fsdp_managed_module" in vars(layer):
            return weight  # a shard: between calls, FSDP2 itself looks here for it, and would shard what it finds
        return adapted_weight(weight, cast(Adapters, layer.lora)[parameter])
    except AttributeError as error:
        # An AttributeError would send Python on to nn.Module.__getattr__, which finds the bare weight: silently wrong.
        raise RuntimeError(f"reading the adapted {parameter!r} failed: {error}") from error


@cache
def _reading_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base` in which reading each of `names` gives the adapted weight."""
    namespace: dict[str, Any] = {name: property(partial(_read, parameter=name)) for name in names}
    namespace["_read_by_lorakit"] = names
    namespace["__module__"] = base.__module__

    def reduce(layer: nn.Module, protocol: Any) -> Any:
        """Pickle as the base's class would, plus the names: a class made at run time cannot be imported."""
        make, args, *state = super(subclass, layer).__reduce_ex__(protocol)
        if args and args[0] is subclass:  # copyreg.__newobj__(cls)
            return (_new, (base, names), *state)
        return (make, args, *state)

    namespace["__reduce_ex__"] = reduce
    if issubclass(base, nn.RNNBase):
        # torch's RNNs hand this list to their kernel instead of reading the attributes.
        namespace["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    subclass = cast(Any, type(base))(f"Adapted{base.__name__}", (base,), namespace)
    return cast(type[nn.Module], subclass)


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    subclass = _reading_class(cast(Any, base), names)
    return subclass.__new__(subclass)


def _flat_weights(layer: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


def _set_flat_weights(layer: nn.RNNBase, value: Any) -> None:
    """Torch rebuilds its list after `.to()`; ours is derived at each read, so there is nothing to keep."""
