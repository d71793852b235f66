"""A small model that has a layer under every name of the seeds, which fits their adapters."""

import types

import torch
from torch import nn

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
WIDTH, HEADS = 8, 2


class Model(nn.Module):
    """Layers by dotted names, and a config as transformers has it."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(
            model_type="llama", num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=WIDTH
        )
        for name, layer in layers.items():
            at: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in at._modules:
                    at.add_module(parent, nn.Module())
                at = at.get_submodule(parent)
            at.add_module(last, layer)


def layers() -> dict[str, nn.Module]:
    """The layers by their names."""
    plain = ["unet.0", *(f"{UNET}.{each}" for each in ("to_q", "to_k", "to_v"))]
    plain += [f"model.layers.{block}.{name}" for block in (0, 1) for name in LLAMA]
    return {
        **{name: nn.Linear(WIDTH, WIDTH) for name in plain},
        "unet.1": nn.Conv2d(2, 3, 2),
        "words": nn.Embedding(5, 4),
        "experts": Experts(),
    }


class Experts(nn.Module):
    """A stack of matrices that is no layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))


def model() -> Model:
    """A fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(layers())
