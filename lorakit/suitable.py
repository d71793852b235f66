"""Whether a weight can be adapted, and where; each refusal says why, and what would work."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lorakit.errors import LorakitError
from lorakit.layers import Adapters, Foreign, Kind, attribute, base_weight, scheme_of
from lorakit.state import join

_FREE = object()


def check_weight(module: nn.Module, kind: Kind, path: str, whole: bool = False) -> None:
    """Whether this weight of the layer can be adapted; if it is trained as a whole, it need not be a matrix.

    Raises:
        LorakitError: it cannot, and why.
    """
    name = join(path, kind.parameter)
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise LorakitError(f"cannot adapt {name!r}: a {type(module).__name__} would call what is added to it")
    taken = attribute(module, "lora", default=_FREE)
    if taken is not _FREE and not isinstance(taken, Adapters):
        raise LorakitError(f"cannot adapt {name!r}: {type(module).__name__} has a 'lora' of its own, our place")
    if isinstance(kind, Foreign):
        return
    weight: Any = base_weight(module, kind.parameter)
    if is_lazy(weight):
        raise LorakitError(f"cannot adapt {name!r}: its shape is not known yet; run the model once first")
    if (scheme := scheme_of(weight)) is not None:
        raise LorakitError(
            f"cannot adapt {name!r}: it is quantized ({scheme}) and no linear layer is called with it; LoRA needs a "
            f"floating-point weight here, and this one is {weight.dtype}"
        )
    if not weight.dtype.is_floating_point:
        raise LorakitError(f"cannot adapt {name!r}: its dtype is {weight.dtype}; LoRA needs a floating-point weight")
    if (weight.dim() < 2 and not whole) or 0 in weight.shape:
        raise LorakitError(f"cannot adapt {name!r}: its shape {tuple(weight.shape)} is no matrix")


def only_read(name: str) -> LorakitError:
    """The refusal of a place beside a weight that no call of its layer uses."""
    return LorakitError(f"{name!r} is read, not called, so nothing can sit beside it; use mode='auto' or 'weight'")


def only_called(module: nn.Module, kind: Foreign, name: str) -> LorakitError:
    """The refusal of a place in a weight that only its own layer can read."""
    why = f"it is quantized ({kind.scheme})" if kind.scheme else f"a {type(module).__name__} may use it in its own way"
    cure = "" if kind.scheme else ", or name the parameter itself"
    return LorakitError(
        f"{name!r} cannot be adapted in the weight: {why}; adapt the layer beside its call, with mode='auto'{cure}"
    )
