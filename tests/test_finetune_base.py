"""A base: opened from any directory of transformers, or one error that says why not."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_lms import ARCHITECTURES, STORIES, byte_tokenizer, needs_stories, small_lm
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForSequenceClassification, T5Config

from lorakit.errors import LorakitError
from lorakit.finetune.base import device_named, open_base, open_outline
from lorakit.finetune.quiet import quiet_transformers

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def refused(message: str, where, **how) -> str:
    with pytest.raises(LorakitError, match=message) as found:
        open_base(where, **how)
    assert len(str(found.value)) < 700
    return str(found.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_opens_in_eval(tmp_path, architecture):
    base = open_base(small_lm(tmp_path, architecture), device="cpu")
    assert not base.model.training and base.model.dtype == torch.float32 and base.where == str(tmp_path)
    assert base.tokenizer.pad_token_id == 2 and base.tokenizer.eos_token_id == 1
    again = open_base(tmp_path, device="cpu", dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16


@needs_stories
def test_the_real_model_opens_and_writes_what_its_makers_published():
    base = open_base(STORIES, device="cpu")
    ids = torch.tensor([base.tokenizer("Once upon a time")["input_ids"]])
    out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert base.tokenizer.decode(out[0], skip_special_tokens=True).startswith("Once upon a time, there was a little")


def test_a_tokenizer_without_pad_and_end_is_given_what_it_knows_and_the_embedding_stays(tmp_path):
    small_lm(tmp_path, pad=False, eos=False, eos_token_id=1)
    base = open_base(tmp_path, device="cpu")
    size = base.model.get_input_embeddings().weight.shape[0]
    assert base.tokenizer.eos_token == "</s>" and base.tokenizer.pad_token_id < size == len(base.tokenizer)
    small_lm(tmp_path / "none", pad=False, eos=False)
    base = open_base(tmp_path / "none", device="cpu")
    assert base.tokenizer.eos_token is None and base.tokenizer.pad_token_id < size


def alike(folder: Path, tokens: list[int]) -> None:
    """These tokens have one row in the output embedding, as those that training never saw may have."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][tokens] = tensors["lm_head.weight"][tokens[0]].clone()
    save_file(tensors, path, {"format": "pt"})


def test_an_end_of_text_that_was_never_trained_is_that_with_which_texts_begin(tmp_path):
    small_lm(tmp_path)
    assert open_base(tmp_path, device="cpu").notes == ()
    alike(tmp_path, [1, 3, 200])
    for base in (open_base(tmp_path, device="cpu"), open_outline(tmp_path)):
        assert base.tokenizer.eos_token == "<s>" and base.tokenizer.pad_token == "<pad>"
        assert "'</s>' was never trained: to this model it is 2 other tokens too; texts end with '<s>'" in base.notes[0]
    alike(tmp_path, [1, 0, 3])
    for base in (open_base(tmp_path, device="cpu"), open_outline(tmp_path)):
        assert base.tokenizer.eos_token == "</s>" and "answers may not end" in base.notes[0]


@needs_stories
def test_the_real_model_ends_texts_with_the_token_that_parts_its_stories():
    for base in (open_base(STORIES, device="cpu"), open_outline(STORIES)):
        assert base.tokenizer.eos_token == "<s>" and "never trained" in base.notes[0]
    base = open_base(STORIES, device="cpu")
    story = "Once upon a time, there was a girl. She was happy. The end."
    with torch.no_grad():
        logits = base.model(torch.tensor([base.tokenizer(story)["input_ids"]])).logits[0, -1]
    assert logits[1] > logits[2] + 10, "after its last words the model wants the one, and never the other"


def test_an_end_of_text_beyond_the_embedding_is_none(tmp_path):
    small_lm(tmp_path)
    tokenizer = byte_tokenizer(eos=False)
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(tmp_path)
    base = open_base(tmp_path, device="cpu")
    assert base.tokenizer.eos_token_id == 1, "that of the model's config"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{bad", "config"),
        ("{}", "config"),
        ("[1]", "config"),
        ('{"model_type": "llamma"}', "llamma"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
        (json.dumps(T5Config().to_dict()), "t5"),
        ('{"model_type": "vit"}', "vit"),
    ],
)
def test_a_config_that_is_none_is_one_message(tmp_path, content, message):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused(message, tmp_path)


def test_places_that_are_no_model_say_what_they_are(tmp_path):
    refused("no directory", tmp_path / "nowhere")
    refused("no config.json", tmp_path)
    refused("which model", "")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    refused("an adapter of some/base", tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.yaml").write_text("model: x")
    refused("a training run", tmp_path)
    refused("is a file", tmp_path / "config.yaml")


def test_a_hub_that_cannot_be_reached_is_one_message_and_soon(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refused("no directory lorakit-tests/none, and as a hub id", "lorakit-tests/none")


CACHED = """
import sys, time
from huggingface_hub import constants
from lorakit.finetune.base import open_base, open_outline
from lorakit.finetune.hub import snapshot
open_base(sys.argv[1])  # imports, and what a first model costs
start = time.monotonic()
base = open_base("me/tiny")
assert time.monotonic() - start < 2, time.monotonic() - start
assert base.where == "me/tiny" and not constants.HF_HUB_OFFLINE
assert open_outline("me/tiny").model.config.model_type == "llama"
assert (snapshot("me/tiny") / "model.safetensors").exists()
"""


def test_a_hub_id_in_the_cache_opens_without_a_network_soon_and_silently(tmp_path):
    """With PEFT installed transformers looks for an adapter beside it, in ways of its own."""
    repository, sha = tmp_path / "hub" / "models--me--tiny", "0123456789abcdef0123456789abcdef01234567"
    folder = small_lm(repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    own = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://no-such-host.invalid"}
    away = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "HF_HUB_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in away} | own
    command = [sys.executable, "-c", CACHED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr


def test_damaged_and_missing_weights_are_named(tmp_path):
    small_lm(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    lacking = {name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}
    save_file(lacking, path, {"format": "pt"})
    said = refused("lacks weights", tmp_path)
    assert "model.layers.1.mlp.down_proj.weight" in said
    save_file({**whole, "lm_head.weight": torch.zeros(3, 4)}, path, {"format": "pt"})
    refused("cannot be loaded|lacks weights", tmp_path)
    path.write_bytes(b"123")
    refused("cannot be loaded", tmp_path)
    path.unlink()
    refused("model.safetensors", tmp_path)


def test_weights_that_no_such_model_has_are_noted(tmp_path):
    small_lm(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "extra.weight": torch.zeros(3)}, path, {"format": "pt"})
    (note,) = open_base(tmp_path, device="cpu").notes
    assert "holds what no LlamaForCausalLM has: extra.weight" in note


def test_a_missing_or_damaged_tokenizer_is_one_message(tmp_path):
    small_lm(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("no tokenizer that can be loaded", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused("no tokenizer that can be loaded", tmp_path)


def test_models_for_other_tasks_are_refused(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "score")
    LlamaForSequenceClassification(LlamaConfig(vocab_size=261, **TINY)).save_pretrained(tmp_path / "score")
    refused(r"lm_head\.weight", tmp_path / "score")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=261, initializer_range=0.5, **TINY)
    with quiet_transformers():
        BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    refused("a token sees those after it", tmp_path / "bert")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "qq"}, "no device"),
        ({"device": "cpu:x"}, "no device"),
        ({"device": "meta"}, "meta"),
        ({"dtype": "int8"}, "must be auto"),
        ({"quantize": "3bit"}, "must be 4bit or 8bit"),
        ({"attention": "magic"}, "magic"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_one_message(tmp_path, how, message):
    refused(message, small_lm(tmp_path), **how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once():
    for device in ("cuda", "cuda:1"):
        with pytest.raises(LorakitError, match="there is no cuda device here"):
            device_named(device)
    assert device_named("auto").type in ("cpu", "mps")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_computes_nearly_the_same_and_goes_on_training(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    small_lm(tmp_path, hidden_size=64, intermediate_size=128, initializer_range=0.05)
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        dense = open_base(tmp_path, device="cpu").model(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bitsandbytes casts its inputs, and says so
            base = open_base(tmp_path, device="cpu", quantize=bits)
            first, second = base.model(ids).logits, base.model(ids).logits
    assert type(base.model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert torch.equal(first, second), "nothing is repacked at the first call"
    assert (first - dense).norm() < 0.3 * dense.norm()
    assert (first - dense).norm() > 0, "it was quantized"


def test_a_base_stored_quantized_is_not_quantized_again(tmp_path):
    pytest.importorskip("bitsandbytes")
    small_lm(tmp_path / "dense", hidden_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = open_base(tmp_path / "dense", device="cpu", quantize="4bit")
        base.model.save_pretrained(tmp_path / "small")
        base.tokenizer.save_pretrained(tmp_path / "small")
        again = open_base(tmp_path / "small", device="cpu")
        ids = torch.arange(5, 25).view(1, -1)
        with torch.no_grad():
            assert torch.allclose(again.model(ids).logits, base.model(ids).logits, atol=1e-4)
    refused("stored quantized already", tmp_path / "small", quantize="4bit")


QUIET = """
import sys
from lorakit.finetune.base import open_base
base = open_base(sys.argv[1])
import bitsandbytes
"""


def test_opening_says_nothing(tmp_path):
    small_lm(tmp_path)
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
