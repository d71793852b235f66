"""Small language models as whole directories of transformers, with a tokenizer of bytes; and the real stories260K."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHARED = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
STORIES = SHARED / "models" / "stories260K"
"""A Llama of 260,000 parameters that was trained on short stories; no chat template, a context of 512."""
needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"no pretrained model {STORIES}; set LORAKIT_SHARED to where it lies"
)

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "gemma": {**GROUPED, "head_dim": 8},
    "phi": SIZE,
    "gpt_neox": SIZE,
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
"""What makes a model of each architecture small; the ways of transformers' config to say it."""
ARCHITECTURES = sorted(CONFIGS)

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template of the ChatML kind."""


def small_lm(
    folder: Path,
    architecture: str = "llama",
    *,
    chat: bool = False,
    pad: bool = True,
    eos: bool = True,
    seed: int = 0,
    shard: str = "5GB",
    **config: Any,
) -> Path:
    """Write a random model and its tokenizer to a directory, and return that.

    Args:
        folder: where; it is made.
        architecture: one of `ARCHITECTURES`.
        chat: whether the tokenizer has a chat template.
        pad: whether it has a pad token; without, it is as many tokenizers are.
        eos: whether it names an end of text.
        seed: of the weights.
        shard: the size of one file of weights at most: "40KB" gives several.
        config: further settings of the model's config.
    """
    tokenizer = byte_tokenizer(chat=chat, pad=pad, eos=eos)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = {**CONFIGS[architecture], **ids, "vocab_size": len(tokenizer), "initializer_range": 0.2, **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(*, chat: bool = False, pad: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, and special ones: any text, and back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    named = {"bos_token": "<s>", **({"eos_token": "</s>"} if eos else {}), **({"pad_token": "<pad>"} if pad else {})}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **named)
    if chat:
        wrapped.chat_template = CHAT
    return wrapped
