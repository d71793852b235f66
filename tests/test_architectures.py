"""Models of many makes, as transformers builds them: nothing is special-cased, and what is not reached is said."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close, randomize
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as hf

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}
IMAGE = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 16,
    "patch_size": 8,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 3}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SEGFORMER = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
}
MODELS = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, TEXT | HEADS | EXPERTS, "text"),
    "gpt-oss": (hf.GptOssForCausalLM, hf.GptOssConfig, TEXT | HEADS | EXPERTS, "text"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, TEXT | HEADS, "text"),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31},
        "text",
    ),
    "deberta": (hf.DebertaV2Model, hf.DebertaV2Config, TEXT, "text"),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, TEXT | {"state_size": 4}, "text"),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5 | {"vocab_size": 31}, "both"),
    "whisper": (hf.WhisperModel, hf.WhisperConfig, WHISPER | {"vocab_size": 31}, "sound"),
    "vit": (hf.ViTModel, hf.ViTConfig, IMAGE, "image"),
    "convnext": (
        hf.ConvNextModel,
        hf.ConvNextConfig,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "image",
    ),
    "segformer": (hf.SegformerModel, hf.SegformerConfig, SEGFORMER, "image"),
}
READ = {
    "mamba": {"conv1d", "dt_proj"},  # its mixer hands their weights to functions
    "t5": {"shared"},  # the encoder and the decoder call tables of their own, tied to it
}
"""Layers of which a hook sees nothing, though the model has their weight."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


def build(name):
    make, config, sizes, kind = MODELS[name]
    torch.manual_seed(0)
    model = make(config(**sizes)).eval().requires_grad_(False)
    words, image = torch.randint(1, 31, (2, 5)), torch.randn(2, 3, 16, 16)
    inputs = {
        "text": {"input_ids": words},
        "both": {"input_ids": words, "decoder_input_ids": words[:, :4]},
        "sound": {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": words},
        "image": {"pixel_values": image},
    }[kind]
    return model, inputs


@pytest.mark.parametrize("variant", [lk.LoRA(rank=1), lk.DoRA(rank=1)], ids=["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_adapted_and_what_a_hook_does_not_reach_is_said(name, variant, tmp_path):
    model, inputs = build(name)
    y, fresh = model(**inputs)[0], copy.deepcopy(model)
    lk.attach(model, variant, [cls for cls in LAYERS if any(type(m) is cls for m in model.modules())])
    partly = copy.deepcopy(fresh)  # torch takes other kernels where something is trained
    for weight in lk.adapters(model)["default"].weights:
        partly.get_parameter(weight).requires_grad_()
    assert any(torch.equal(model(**inputs)[0], bare(**inputs)[0]) for bare in (fresh, partly))
    randomize(model, std=0.1)
    silent = {row.weight.split(".")[-2] for row in lk.probe(model, **inputs).weights if row.eval != "effective"}
    assert silent == READ.get(name, set())
    adapted = model(**inputs)[0]
    lk.save(model, tmp_path / "a")
    lk.load(fresh, tmp_path / "a", trainable=True)
    assert torch.equal(fresh(**inputs)[0], adapted)
    if name not in READ:
        with lk.merged(model):
            assert_close(model(**inputs)[0], adapted, factor=50)
    lk.detach(model)
    assert torch.equal(model(**inputs)[0], y)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_stacks(name):
    model, inputs = build(name)
    y = model(**inputs)[0]
    stacks = [key for key, p in model.named_parameters() if p.dim() == 3]
    plan = lk.attach(model, lk.LoRA(rank=1), stacks, example=inputs)
    assert len(plan.rows) == 4 and all(row.tensors["A"][0] == 3 for row in plan.rows)
    assert torch.equal(model(**inputs)[0], y)


def test_what_a_model_reads_is_cured_by_the_weight():
    model, inputs = build("mamba")
    with pytest.raises(lk.LorakitError, match=r"dt_proj.weight' is bypassed.*mode='weight'"):
        lk.attach(model, lk.LoRA(rank=1), "dt_proj", example=inputs)
    lk.attach(model, lk.LoRA(rank=1), ["dt_proj", "conv1d"], mode="weight", example=inputs)
