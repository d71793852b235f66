"""The models that are timed, bare and adapted by each library with the same factors."""

import copy
import warnings

import torch
from torch import Tensor, nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers


def linear(d: int) -> nn.Sequential:
    """One square linear layer, frozen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, d)).requires_grad_(False)


def llama(hidden: int = 512, layers: int = 4, vocabulary: int = 1024) -> nn.Module:
    """A Llama of seven linear layers in each of its layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(2.75 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def ours(base: nn.Module, rank: int, targets: object = "all-linear", variant: lk.LoRA | None = None) -> nn.Module:
    """A copy with an adapter of lorakit that does something."""
    model = copy.deepcopy(base)
    lk.attach(model, variant or lk.LoRA(rank=rank), targets, exclude="lm_head" if hasattr(base, "lm_head") else None)
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter.normal_(std=0.02)
    return model


def theirs(base: nn.Module, model: nn.Module, rank: int) -> nn.Module:
    """PEFT's model on another copy, with the factors of ours."""
    weights = [name.removesuffix(".weight") for name in lk.adapters(model)["default"].weights]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=weights)
    other = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for key, factor in lk.adapter_state_dict(model).items():
            other.get_parameter(key.replace(".weight", ".default.weight")).copy_(factor)
    return other


def check_equal(*outputs: Tensor) -> None:
    """The arms must compute the same before they are timed."""
    first = outputs[0]
    for other in outputs[1:]:
        error = (other - first).abs().max().item()
        if error > 1e-4 * max(1.0, first.abs().max().item()):
            raise AssertionError(f"the arms do not agree: {error}")
