"""Merging into a checkpoint is merging into the live model, to the bit; what does not fit is refused before it appears."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import attached
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit import LorakitError
from lorakit.merge_checkpoint import merge_checkpoint

VARIANTS = [
    lk.LoRA(rank=3, alpha=5),
    lk.LoRA(rank=2, dropout=0.1, init="pissa"),
    lk.DoRA(rank=2),
    lk.LoHa(rank=2),
    lk.LoKr(rank=2),
    lk.VeRA(rank=8),
    lk.AdaLoRA(rank=3),
]


def llama(dtype: torch.dtype = torch.float32, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **more,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def saved(model: nn.Module, path: Path, shards: str = "30KB") -> Path:
    model.save_pretrained(path, max_shard_size=shards)
    (path / "tokenizer.json").write_text("{}")
    return path


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def heads(folder: Path) -> dict[str, bytes]:
    """The header of each file: names, shapes, dtypes, places and metadata."""
    contents = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    return {name: content[: 8 + int.from_bytes(content[:8], "little")] for name, content in contents.items()}


def same_bits(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: type(variant).__name__)
def test_it_is_merging_into_the_live_model_to_the_bit(make, variant, dtype, tmp_path):
    base = saved(make(dtype), tmp_path / "base")
    targets = "all-linear" if make is llama else ["c_attn", "c_proj", "c_fc"]  # its head is tied to the embedding
    model = attached(make(dtype), variant, targets=targets)
    merge_checkpoint(base, lk.adapter_value(model), tmp_path / "out", least_survival=0, scale=0.5)
    lk.merge(model, {"default": 0.5})
    same_bits(values(tmp_path / "out"), model.state_dict())
    assert heads(tmp_path / "out") == heads(base)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    same_bits(again.state_dict(), again.state_dict() | values(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_weights_and_rows_and_an_embedding(dtype, tmp_path):
    base = saved(llama(dtype), tmp_path / "base")
    model = llama(dtype)
    how = {"targets": ["q_proj", "lm_head"], "train_also": ["norm"], "train_rows": {"embed_tokens": [3, 9]}}
    attached(model, lk.LoRA(rank=2), **how)
    report = merge_checkpoint(base, lk.adapter_value(model), tmp_path / "out", least_survival=0)
    lk.merge(model)
    same_bits(values(tmp_path / "out"), model.state_dict())
    assert "model.norm.weight" in [weight.name for weight in report.weights]
