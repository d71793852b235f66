"""Run a model without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def spare_buffers(root: nn.Module) -> Iterator[None]:
    """Let the model write into copies of its buffers: running statistics and the like stay as they were."""
    with ExitStack() as aside:
        for module in root.modules():
            copies = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            if isinstance(module, torch.jit.ScriptModule):  # its buffers lie where Python cannot swap them
                for name, copy in copies.items():
                    aside.callback(cast(Tensor, module._buffers[name]).copy_, copy)
            else:
                aside.enter_context(swapped(module._buffers, copies))
        yield


@contextmanager
def swapped(held: dict[str, Any], others: dict[str, Any]) -> Iterator[None]:
    """Other values in a mapping for a while. Nothing is written into a tensor: autograd may still need it."""
    before = {name: held[name] for name in others}
    held.update(others)
    try:
        yield
    finally:
        held.update(before)
