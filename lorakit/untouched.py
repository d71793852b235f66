"""Run a model without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def spare_buffers(root: nn.Module) -> Iterator[None]:
    """Let the model write into copies of its buffers: running statistics and the like stay as they were.

    So do the weights of embeddings with `max_norm`.
    """
    with ExitStack() as aside:
        for module in root.modules():
            copies = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            rescales = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
            weight = module._parameters.get("weight") if rescales else None
            if weight is not None:  # torch writes into the rows that are looked up, past autograd
                aside.callback(weight.data.copy_, weight.detach().clone())
            if isinstance(module, torch.jit.ScriptModule):  # its buffers lie where Python cannot swap them
                for name, copy in copies.items():
                    if copy is not None:
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
