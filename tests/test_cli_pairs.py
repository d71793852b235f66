"""`lorakit convert` and `lorakit compare` from format to format: the same adapter, and the same outputs live."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lorakit as lk
from lorakit.cli import app

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

IDS = torch.tensor([[1, 7, 2, 9], [8, 3, 8, 4]])
SUFFIXES = {
    **{"lorakit": "", "peft": "", "mlx": "", "litgpt": "", "torchtune": "", "gguf": ".gguf", "loralib": ".pt"},
    **{
        "kohya": ".safetensors",
        "diffusers": ".safetensors",
        "diffusers-old": ".safetensors",
        "comfyui": ".safetensors",
    },
}
IMAGE = ("kohya", "diffusers", "diffusers-old", "comfyui")
VARIANTS = {
    "alpha/r": {"variant": lk.LoRA(rank=2, alpha=6)},
    "rslora": {"variant": lk.LoRA(rank=4, alpha=6, scaling="rslora")},
    "patterns": {"variant": lk.LoRA(rank=4, alpha=6), "ranks": {"*.q_proj": 2}, "alphas": {"*1.*.v_proj": 3}},
}


def arch(form: str) -> list[str]:
    """What a format is told that has names of its own for an architecture."""
    return ["--arch", "llama"] if form in ("gguf", "torchtune") else []


@pytest.fixture(scope="module", params=VARIANTS)
def ours(request, tmp_path_factory) -> tuple[nn.Module, Path, torch.Tensor]:
    """A Llama, its directory with an adapter of it beside, and its outputs with that."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"vocab_size": 31, "num_key_value_heads": 2, "max_position_embeddings": 32},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    adapted = copy.deepcopy(model)
    given = dict(VARIANTS[request.param])
    lk.attach(adapted, given.pop("variant"), targets=["q_proj", "v_proj", "down_proj"], **given)
    with torch.no_grad():
        for parameter in lk.adapter_parameters(adapted):
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        expected = adapted(IDS).logits
    lk.save(adapted, folder / "ours")
    return model, folder, expected


def lorakit(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def alpha_in(told: str) -> str:
    """The alpha that whoever writes a file without one is told."""
    return told.partition("lora_alpha=")[2].split()[0]


@pytest.mark.parametrize("first", SUFFIXES)
def test_from_each_format_to_each(ours, first, tmp_path):
    model, folder, expected = ours
    source = tmp_path / f"{first}{SUFFIXES[first]}"
    heads = ["--heads", 4, "--kv-heads", 2] if first in ("litgpt", "torchtune", "gguf") else []
    part = ["--part", "transformer"]
    told = lorakit(
        "convert", folder / "ours", source, "--to", first, *heads, *arch(first), *(part if first in IMAGE else [])
    )
    alpha = ["--alpha", alpha_in(told)] if first == "loralib" else []
    names = ["--names", folder / "model"]
    for then, suffix in SUFFIXES.items():
        out = tmp_path / f"{first}-{then}{suffix}"
        parts = part if first in IMAGE or then in IMAGE else []
        told = lorakit("convert", source, out, "--to", then, *alpha, *names, *arch(then), *parts)
        said = alpha_in(told) if then == "loralib" else None
        compared = lorakit("compare", folder / "ours", out, *names, *(["--alpha", said] if said else []))
        assert "the same adapter" in compared, compared
        live = copy.deepcopy(model)
        lk.load(live, out, "x", alpha=None if said is None else float(said))
        with torch.no_grad():
            assert_close(live(IDS).logits, expected, factor=4)


@pytest.mark.parametrize("form", ["peft", "litgpt", "torchtune", "gguf"])
def test_merging_takes_the_heads_from_the_base(ours, form, tmp_path):
    model, folder, expected = ours
    source = tmp_path / f"{form}{SUFFIXES[form]}"
    heads = [] if form == "peft" else ["--heads", 4, "--kv-heads", 2]
    lorakit("convert", folder / "ours", source, "--to", form, *heads, *arch(form))
    lorakit("merge", folder / "model", source, tmp_path / "merged")
    live = copy.deepcopy(model)
    live.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert_close(live(IDS).logits, expected, factor=4)


def test_without_names_what_changes_nothing_needs_none(ours, tmp_path):
    """LitGPT has factors for all three layers of an MLP, if for one: those of the others are zero."""
    _, folder, _ = ours
    heads = ["--heads", 4, "--kv-heads", 2]
    lorakit("convert", folder / "ours", tmp_path / "lit", "--to", "litgpt", *heads)
    assert "the same adapter" in lorakit("compare", folder / "ours", tmp_path / "lit", *heads)


def test_alpha_goes_to_those_that_lack_it(ours, tmp_path):
    _, folder, _ = ours
    bare = tmp_path / "bare.pt"
    alpha = alpha_in(lorakit("convert", folder / "ours", bare, "--to", "loralib"))
    lorakit("combine", f"{folder / 'ours'}=1", f"{bare}=-1", tmp_path / "sum", "--alpha", alpha)
    for weight in lk.read(tmp_path / "sum").weights:
        B, A = weight.product()
        assert_close(B @ A, torch.zeros(B.shape[0], A.shape[1]))


def test_what_no_file_needs_is_refused(ours, tmp_path):
    _, folder, _ = ours
    for words in (
        ("compare", folder / "ours", folder / "ours", "--alpha", 8),
        ("combine", folder / "ours", tmp_path / "out", "--alpha", 8),
        ("convert", folder / "ours", tmp_path / "out", "--to", "mlx", "--heads", 4),
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code != 0
        assert "leave it away" in done.output + repr(done.exception)


def pipeline(path: Path) -> tuple[Path, Path]:
    """An adapter of a UNet and a text encoder, as diffusers and as sd-scripts have it."""
    torch.manual_seed(0)
    dotted, flat = {}, {}
    for part, prefix, name in (
        ("unet", "lora_unet_", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("unet", "lora_unet_", "mid_block.attentions.0.proj_in"),
        ("text_encoder", "lora_te_", "text_model.encoder.layers.0.self_attn.q_proj"),
    ):
        A, B, alpha = torch.randn(2, 8), torch.randn(8, 2), torch.tensor(1.0)
        dotted |= {f"{part}.{name}.lora_A.weight": A, f"{part}.{name}.lora_B.weight": B, f"{part}.{name}.alpha": alpha}
        stem = prefix + name.replace(".", "_")
        flat |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": alpha}
    one, other = path / "diffusers.safetensors", path / "kohya.safetensors"
    save_file({key: tensor.clone() for key, tensor in dotted.items()}, one)
    save_file({key: tensor.clone() for key, tensor in flat.items()}, other)
    return one, other


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_flattened_names_are_found_in_the_dotted_ones_of_the_other(tmp_path, part):
    one, other = pipeline(tmp_path)
    for pair in ((one, other), (other, one)):
        told = lorakit("compare", *pair, "--part", part)
        assert "the same adapter:" in told
        assert told.count("not compared: ") == 2


def test_what_is_not_compared_is_said(tmp_path):
    one, other = pipeline(tmp_path)
    save_file({key: tensor for key, tensor in load_file(one).items() if key.startswith("unet")}, one)
    told = lorakit("compare", one, other)
    assert "not compared: B also holds 1 weights of lora_te_" in told
    assert "the same adapter, but for what was not compared" in told
