"""Layers that give no gradient to their input: what trains below one would silently get a part of its gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


def guarded(layer: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
    """The layer's output. If no gradient passes to its input, where one is wanted, `backward()` will raise."""
    x = args[0] if args else None
    wanted = isinstance(x, Tensor) and isinstance(y, Tensor) and x.requires_grad and torch.is_grad_enabled()
    if not wanted or not is_severed(y):
        return y
    return _Severed.apply(y.detach(), x, layer)  # type: ignore[no-untyped-call]


def is_severed(y: Tensor) -> bool:
    """Whether no gradient can pass from a layer's output to its input."""
    if not y.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return False
    # The node that torch puts after a kernel without a derivative, or behind one more, of a bias or a cast. It has no
    # type in Python, only this name.
    node: Any = y.grad_fn
    for _ in range(2):
        if node is None or node.name().endswith("NotImplemented"):
            return node is not None
        node = node.next_functions[0][0] if node.next_functions else None
    return False


class _Severed(torch.autograd.Function):
    """Y as it is, and an error as soon as a gradient comes back.

    Layers that round their input, or run an inference kernel, give no gradient to it. Whatever trains below would see
    the part of the gradient that came through the adapter alone, and nothing would say so.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer = ctx.layer
        if getattr(getattr(layer._parameters.get("weight"), "quant_state", None), "packing_format_for_cpu", False):
            cure = (
                "bitsandbytes has reordered its weight for inference on this CPU: load the base again, and set "
                "support_avx512bf16_for_cpu = False on such layers before the first call"
            )
        else:
            cure = "quantize only the weights (NF4, say) and not the activations, or adapt no layer below it"
        raise LorakitError(
            f"a {type(layer).__module__}.{type(layer).__qualname__} sends no gradient to its input, so what trains "
            f"below it would get a part of its gradient; {cure}"
        )
