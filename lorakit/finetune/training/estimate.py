"""What a run takes of memory, before it is tried."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.plan import Plan
from lorakit.tables import size

_STORED = {"4bit": 0.53, "8bit": 1.01}
"""Bytes of a quantized number with its share of the scales."""


@dataclass(frozen=True)
class Memory:
    """Bytes, as far as they can be told before.

    Attributes:
        base: the frozen weights.
        adapter: the trained tensors with their gradients and Adam's state.
        batch: what a batch keeps for the backward pass.
    """

    base: int
    adapter: int
    batch: int

    def __str__(self) -> str:
        total = self.base + self.adapter + self.batch
        return (
            f"about {size(total)}: base {size(self.base)}, adapter with gradients and Adam's state "
            f"{size(self.adapter)}, a batch {size(self.batch)}"
        )


def estimate(
    model: nn.Module,
    config: Any,
    plan: Plan,
    *,
    quantize: str | None,
    bytes_each: int,
    tokens: int,
    checkpointing: bool,
) -> Memory:
    """What training takes.

    A layer keeps for each token, in units of the model's width, about 10 (the inputs of its norms and projections, q,
    k, v, the attention's result) and of its inner width about 4 (gate, up, their product, the activation); with
    gradient checkpointing its input alone, and one layer at a time all of it. The head's logits are kept in the
    model's dtype and in float32, and have a gradient. Attention that forms its matrix takes more.

    Args:
        model: the base, on any device.
        config: its config.
        plan: what is attached.
        quantize: "4bit", "8bit" or None.
        bytes_each: of a number of the base that is not quantized, and of an activation.
        tokens: of a batch, padding counted.
        checkpointing: whether layers are computed again in the backward pass.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    matrices = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if quantize is None:
        base = numbers * bytes_each
    else:
        inner = _head_numbers(model)
        small = matrices - inner
        base = int(small * _STORED[quantize] + (numbers - small) * bytes_each)
    width = _first(text, "hidden_size", "n_embd", "d_model") or 0
    inside = _first(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers") or 1
    vocabulary = _first(text, "vocab_size") or 0
    layer = (10 * width + 4 * inside) * bytes_each
    kept = layers * width * bytes_each + layer if checkpointing else layers * layer
    head = vocabulary * (bytes_each + 8)
    return Memory(base, 4 * sum(row.bytes for row in plan.rows), tokens * (kept + head))


def _head_numbers(model: nn.Module) -> int:
    """Of the output head, which stays as it is."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return head.weight.numel() if type(head) is nn.Linear else 0


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
