"""Small Llamas for the formats of language models: the model, what it computes, and adapters on it."""

import copy
import warnings

import torch
from torch import Tensor, nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers


HEADS, GROUPS, SIZE, WIDTH, WIDE = 4, 2, 6, 16, 20
IDS = torch.tensor([[1, 7, 2, 9, 30]])
R, ALPHA = 3, 5.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(cls=None, config=None, **more) -> nn.Module:
    torch.manual_seed(0)
    config = (config or transformers.LlamaConfig)(
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        vocab_size=31,
        initializer_range=0.5,
        **more,
    )
    return (cls or transformers.LlamaForCausalLM)(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def with_deltas(model: nn.Module, deltas: dict[str, Tensor]) -> Tensor:
    """The logits of a copy whose weights are W + ΔW."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        model.get_submodule(name).weight += delta
    return logits(model)


@torch.no_grad()
def trained(model: nn.Module, targets=TARGETS, method=None, **more) -> nn.Module:
    lk.attach(model, method or lk.LoRA(rank=R, alpha=ALPHA), targets, **more)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model
