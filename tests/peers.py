"""PEFT's models, made to compare with: small bases, and each method that PEFT has and computes rightly."""

import copy
import warnings
from typing import Any

import pytest
import torch
from models import mlp
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=32)
    )


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, (3, 2), stride=2, padding=1), nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.Tanh())


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(31, 6, padding_idx=0), nn.Linear(6, 4))


MODELS = {
    "gpt2": (gpt2, ["c_attn", "c_proj", "wte"]),
    "conv": (conv, ["0", "2"]),
    "conv-2d": (conv, ["0"]),
    "words": (words, ["0", "1"]),
    "mlp": (mlp, ["0", "2"]),
    "llama": (llama, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    "neox": (neox, ["query_key_value", "dense", "dense_h_to_4h"]),
    "bert": (bert, ["query", "value"]),
}
SPECS = {
    "standard": lk.LoRA(rank=2, alpha=5),
    "rslora": lk.LoRA(rank=3, alpha=4, scaling="rslora"),
    "gaussian": lk.LoRA(rank=2, init="gaussian"),
    "dora": lk.DoRA(rank=2, alpha=3),
    "loha": lk.LoHa(rank=2, alpha=3),
    "lokr": lk.LoKr(rank=1, alpha=2),
    "lokr-both": lk.LoKr(rank=1, factor=3, decompose_both=True),
    "vera": lk.VeRA(rank=3, seed=7),
    "adalora": lk.AdaLoRA(rank=2, alpha=3),
}
THEIRS = {
    "dora": ["mlp", "llama", "gpt2", "conv", "words", "bert"],
    "loha": ["mlp", "llama", "conv-2d", "bert"],
    "lokr": ["mlp", "llama", "conv-2d", "bert"],
    "lokr-both": ["mlp", "llama", "conv-2d"],
    "vera": ["mlp", "llama", "bert"],
    "adalora": ["mlp", "llama", "bert"],
}
"""What PEFT has each method for, and computes rightly; LoRA for all."""
PAIRS = [(kind, spec) for spec in SPECS for kind in THEIRS.get(spec, [name for name in MODELS if name != "conv-2d"])]
over_peers = pytest.mark.parametrize(
    ("kind", "spec"), [pytest.param(kind, SPECS[spec], id=f"{kind}-{spec}") for kind, spec in PAIRS]
)


def build(kind: str) -> tuple[nn.Module, torch.Tensor, list[str]]:
    """A model of random weights, an input for it, and the layers to adapt."""
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    if kind.startswith("conv"):
        return model, torch.randn(3, 1, 2, 6), targets
    return model, torch.randn(3, 6) if kind == "mlp" else torch.randint(1, 31, (2, 5)), targets


def out(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output[0]


CONFIGS = {
    "LORA": peft.LoraConfig,
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
    "VERA": peft.VeraConfig,
    "ADALORA": peft.AdaLoraConfig,
}


def by_peft(base: nn.Module, targets, spec: Any = None, **more):
    """A PEFT model on a copy of the base, with noise in what it trains."""
    fields = {**(spec or lk.LoRA(rank=3)).peft_fields(), **more}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it is then set to True
        warnings.filterwarnings("ignore", "Note that `r` is not used in AdaLora")
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")
        config = CONFIGS[fields.pop("peft_type")](target_modules=targets, **fields)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("base_layer"):
            # It begins at zero and gets no gradient, but PEFT's DoRA counts it in its norms.
            model.get_submodule(name.rpartition(".")[0]).lora_embedding_A["default"].data[:, module.padding_idx] = 0
    return model


def live_key(key: str) -> str:
    """The name that a tensor of PEFT's files has in a PEFT model."""
    key = key + ".weight" if key.endswith("magnitude_vector") else key
    return key.replace(".weight", ".default.weight") if key.endswith(".weight") else f"{key}.default"


def assert_near(got: torch.Tensor, wanted: torch.Tensor, limit: float = 5e-6) -> None:
    assert (got - wanted).abs().max().item() <= limit * max(1.0, wanted.abs().max().item())
