"""How updates reach a layer's computation: at its calls for *beside*, a property of its class for *in the weight*.

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
from lorakit.layers.adapters import AdaptedWeight, Adapters
from lorakit.layers.called import has_our_forward, unwatch, watch
from lorakit.layers.kind import accumulation_dtype, base_weight


class _Watched(dict[str, Any]):
    """The parameters of a layer that has our hook or our forward.

    Code that `torch.compile` made before that came would go on without it: compiled code checks neither. But it does
    check the type of this mapping, and so it is left when the hook comes or goes, and taken up again later.
    """


def adapters_of(layer: nn.Module) -> Adapters | None:
    """What is installed on the layer, if anything."""
    if "lora" not in layer._modules:  # a scripted module's mapping has no `get`
        return None
    lora = layer._modules["lora"]
    return lora if isinstance(lora, Adapters) else None


def install(layer: nn.Module, adapters: Adapters) -> None:
    """Make `adapters` act on the layer; also to be called after its contents have changed.

    Unless `AdaptedWeight.has_alike` says that nothing is different for the layer.
    """
    if "lora" in layer._modules:
        uninstall(layer)
    layer._modules["lora"] = adapters  # `add_module`, whose checks were made when the weight was chosen
    if any(adapters[parameter].holds("beside") for parameter in adapters):
        watch(layer, adapters)
        if type(layer._parameters) is dict:
            vars(layer)["_parameters"] = _Watched(layer._parameters)  # past torch's setter, which takes longer
    names = tuple(sorted(parameter for parameter in adapters if adapters[parameter].holds("weight")))
    if names:
        layer.__class__ = _reading_class(cast(Any, type(layer)), names)


def check_changeable(layer: nn.Module) -> None:
    """Whether adapters can be put on this layer and taken off.

    Raises:
        LorakitError: its class was changed after it was adapted in the weight, or its forward after it was adapted.
    """
    adapters, cls = adapters_of(layer), type(layer)
    if adapters is not None and adapters.stands_in and not has_our_forward(layer):
        raise LorakitError(
            f"cannot change the adapters of a {cls.__name__}: its forward was replaced after attaching (by hooks of "
            "accelerate, say); undo that first"
        )
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
    unwatch(layer, adapters)
    if isinstance(layer._parameters, _Watched):
        vars(layer)["_parameters"] = dict(layer._parameters)
    if reading:
        layer.__class__ = type(layer).__bases__[0]
        if isinstance(layer, nn.RNNBase):
            layer._flat_weights = _flat_weights(layer)
    del layer._modules["lora"]
    return adapters


def adapted_weight(weight: Tensor, adapted: AdaptedWeight) -> Tensor:
    """The weight with every update that acts in it. With none it is the very same object."""
    result = weight
    for update, strength in adapted.acting():
        if update.mode == "beside":
            continue
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
