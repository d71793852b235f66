"""diffusers' files, ComfyUI's and XLabs': read, loaded, and written as they were."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_close, dense, refused
from image_files import INPUT, KEPT, METHODS, Net, content, lora, made, rand, weights_of, write_file
from torch import nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.formats import FORMATS, Known
from lorakit.formats.content import Content

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
LISTS = SHARED / "adapters" / "lora-key-lists"

LIST_OUTCOMES = {
    "anima_lora_kohya_format": ("kohya", 11),
    "anima_lora_kohya_with_te_format": ("kohya", 9),
    "anima_lora_lokr_format": ("comfyui", "DoRA magnitude on LoKr"),
    "anima_lora_peft_format": ("comfyui", 6),
    "flux_control_lora_format": ("diffusers", 780),
    "flux_dora_onetrainer_format": ("kohya", "a magnitude of each input"),
    "flux_lokr_bfl_format": ("comfyui", 6),
    "flux_lora_aitoolkit_format": ("comfyui", 228),
    "flux_lora_diffusers_base_model_format": ("peft", 381),
    "flux_lora_diffusers_format": ("diffusers", 494),
    "flux_lora_diffusers_no_proj_mlp_format": ("diffusers", 342),
    "flux_lora_kohya_format": ("kohya", 304),
    "flux_lora_kohya_with_te1_format": ("kohya", 376),
    "flux_lora_xlabs_format": ("xlabs", 12),
    "krea2_lora_kohya_format": ("kohya", 40),
    "qwen_image_lora_diffusers_format": ("comfyui", 3),
    "qwen_image_lora_kohya_format": ("kohya", 8),
}
"""List → its format, and how many weights it has, or why it is refused."""


@pytest.mark.skipif(not LISTS.is_dir(), reason=f"no key lists in {LISTS}")
@pytest.mark.parametrize("name", LIST_OUTCOMES)
def test_real_keys_are_of_one_format(name):
    shapes = json.loads((LISTS / f"{name}.json").read_text())["state_dict_keys"]
    tensors = {key: torch.ones((), dtype=torch.float16).expand(shape) for key, shape in shapes.items()}
    it = Content(Path(name), Path(f"{name}.safetensors"), tensors, {}, None, "safetensors")
    form, outcome = LIST_OUTCOMES[name]
    assert [each for each, format in FORMATS.items() if format.recognises(it)] == [form]
    if isinstance(outcome, int):
        value = FORMATS[form].read(it, Known())
        assert len(value.weights) == outcome
        shapes = {weight.name: sum(t.numel() for t in weight.tensors.values()) for weight in value.weights}
        scalars = sum(key.endswith(".alpha") for key in tensors)
        assert sum(shapes.values()) == sum(t.numel() for t in tensors.values()) - scalars
    else:
        with pytest.raises(lk.LorakitError, match=outcome):
            FORMATS[form].read(it, Known())


def dotted(parts, prefix, rename=lambda end: end, alpha=True):
    """Keys with the layers' own names."""
    return {
        f"{prefix}{layer}.{rename(end)}": tensor
        for layer, each in parts.items()
        for end, tensor in each.items()
        if alpha or end != "alpha"
    }


def new(end):
    return {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(end, end)


def default(end):
    return {"lora_down.weight": "lora_A.default.weight", "lora_up.weight": "lora_B.default.weight"}.get(end, end)


def old(end):
    return {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}.get(end, end)


def old_text(end):
    return {"lora_down.weight": "lora_linear_layer.down.weight", "lora_up.weight": "lora_linear_layer.up.weight"}[end]


def same(end):
    return end


STYLES = {
    "diffusers": ("diffusers", "unet.", new, False),
    "with alpha": ("diffusers", "transformer.", new, True),
    "bare": ("diffusers", "", new, False),
    "in memory": ("diffusers", "unet.", default, False),
    "old": ("diffusers-old", "unet.", old, False),
    "old text encoder": ("diffusers-old", "text_encoder.", old_text, False),
    "comfyui": ("comfyui", "diffusion_model.", new, False),
    "ai-toolkit": ("comfyui", "diffusion_model.", new, True),
    "dotted kohya": ("comfyui", "", same, True),
    "dotted kohya without alpha": ("comfyui", "", same, False),
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("style", STYLES)
def test_a_loaded_file_is_the_formula_and_is_written_as_it_was(net, tmp_path, style):
    form, prefix, rename, alpha = STYLES[style]
    tensors, deltas = made(net, lora if alpha else METHODS["without_alpha"])
    path = write_file(tmp_path / "a.safetensors", dotted(tensors, prefix, rename))
    value = read(path)
    assert value.format == form and not value.missing
    wanted = dense(net, deltas)(INPUT)
    named = renamed_for(value, net)
    lk.load(net, path)
    assert_close(net(INPUT), wanted)
    if style == "in memory":
        return  # written as everybody reads it
    write(value, tmp_path / "raw.safetensors", form)
    assert_bits(content(tmp_path / "raw.safetensors"), content(path))
    write(named, tmp_path / "native.safetensors")
    native = read(tmp_path / "native.safetensors")
    assert {w.name for w in native.weights} == set(deltas)
    if prefix:
        write(native, tmp_path / "back.safetensors", form, part=prefix.strip("."))
        assert_bits(content(tmp_path / "back.safetensors"), content(path))


@pytest.mark.parametrize("method", [METHODS[name] for name in KEPT])
def test_comfyui_holds_every_method(net, tmp_path, method):
    tensors, deltas = made(net, method)
    path = write_file(tmp_path / "a.safetensors", dotted(tensors, "diffusion_model."))
    value = read(path)
    assert value.format == "comfyui" or method.__name__ == "lora"
    wanted = dense(net, deltas)(INPUT)
    lk.load(net, value)
    assert_close(net(INPUT), wanted, factor=5)
    write(value, tmp_path / "b.safetensors", "comfyui")
    if method.__name__ != "dora":
        assert_bits(content(tmp_path / "b.safetensors"), content(path))
    if method.__name__.startswith("lo") and method.__name__ != "lora":
        with pytest.raises(lk.LorakitError, match="write it as kohya or comfyui"):
            write(value, tmp_path / "c.safetensors", "diffusers")


def test_names_of_processors(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])

    class CLIPAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    unet, text = nn.ModuleDict({"attn1": Attention()}), nn.ModuleDict({"self_attn": CLIPAttention()})
    for prefix in ("unet.", ""):
        keys = [f"{prefix}attn1.processor.{name}_lora" for name in ("to_q", "to_out")]
        if prefix:
            keys += [f"text_encoder.text_model.self_attn.{name}_lora" for name in ("to_q", "to_out")]
        tensors = {
            f"{key}.{end}.weight": rand(*shape) for key in keys for end, shape in (("down", (2, 4)), ("up", (4, 2)))
        }
        path = write_file(tmp_path / "a.safetensors", tensors)
        value = read(path)
        assert value.format == "diffusers-old"
        named = renamed_for(value, unet)
        found = {weight.name: weight.tensors["B"] for weight in named.weights}
        assert found.keys() == {"attn1.to_q.weight", "attn1.to_out.0.weight"}
        assert torch.equal(found["attn1.to_q.weight"], tensors[f"{keys[0]}.up.weight"])
    two = read(write_file(tmp_path / "b.safetensors", _pipeline()))
    named = renamed_for(two, text)
    assert [weight.name for weight in named.weights] == ["self_attn.q_proj.weight"]
    assert named.left_out == ("1 weights of 'unet'",)
    with pytest.raises(lk.LorakitError, match="part="):
        renamed_for(two, nn.Linear(2, 2))


def _pipeline():
    return {
        f"{key}_lora.{end}.weight": rand(*shape)
        for key in ("unet.attn1.processor.to_q", "text_encoder.text_model.self_attn.to_q")
        for end, shape in (("down", (2, 4)), ("up", (4, 2)))
    }


def test_whole_parameters_are_held(tmp_path):
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "proj": nn.Linear(4, 4)})
    tensors, _ = lora(model["proj"].weight, alpha=None)
    path = write_file(
        tmp_path / "a.safetensors",
        {**dotted({"proj": tensors}, "transformer.", new), "transformer.norm.weight": rand(4)},
    )
    lk.load(model, path)
    wanted = nn.functional.layer_norm(torch.eye(4), (4,), rand(4), torch.zeros(4))
    assert_close(model["norm"](torch.eye(4)), wanted)
    write(read(path), tmp_path / "b.safetensors", "diffusers")
    assert_bits(content(tmp_path / "b.safetensors"), content(path))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_biases_of_control_loras(net, tmp_path, alpha):
    tensors, deltas = made(net, lambda W: lora(W, alpha=alpha))
    added = {layer: rand(W.shape[0], seed=3) for layer, W in weights_of(net).items()}
    given = {**dotted(tensors, "transformer.", new), **{f"transformer.{n}.lora_B.bias": b for n, b in added.items()}}
    path = write_file(tmp_path / "a.safetensors", given)
    wanted = copy.deepcopy(net)
    with torch.no_grad():
        for layer, bias in added.items():
            wanted.get_submodule(layer).bias += bias * ((alpha or 2) / 2)
    wanted = dense(wanted, deltas)(INPUT)
    value = read(path)
    with pytest.raises(lk.LorakitError, match="give the model itself"):
        renamed_for(value, list(weights_of(net)))
    if alpha is None:
        write(value, tmp_path / "b.safetensors", "diffusers")
        assert_bits(content(tmp_path / "b.safetensors"), content(path))
    else:
        with pytest.raises(lk.LorakitError, match="no place"):
            write(value, tmp_path / "b.safetensors", "diffusers")
    with pytest.raises(lk.LorakitError, match="no layer's whole weight"):
        write(value.with_weights(value.weights, naming=""), tmp_path / "b.safetensors", "kohya", part="unet")
    lk.load(net, path)
    assert_close(net(INPUT), wanted)


def test_config_in_the_metadata(net, tmp_path):
    tensors, _ = made(net, METHODS["without_alpha"])
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"up_blocks.0.to_q": 1},
        "unet.peft_type": "LORA",
        "unet.lora_dropout": 0.1,
    }
    given = dotted(tensors, "unet.", new)
    value = read(write_file(tmp_path / "a.safetensors", given, lora_adapter_metadata=config))
    alphas = {weight.name: weight.variant.alpha for weight in value.weights}
    assert alphas.pop("unet.up_blocks.0.to_q.weight") == 1 and set(alphas.values()) == {6}
    for other in (value, renamed_for(value, net)):
        write(other, tmp_path / "b.safetensors", "diffusers")
        assert_bits(content(tmp_path / "b.safetensors"), content(tmp_path / "a.safetensors"))
        assert [w.variant for w in read(tmp_path / "b.safetensors").weights] == [w.variant for w in value.weights]
    for bad, word in (
        ("[1]", "lora_adapter_metadata"),
        ('{"unet.r": 2}', "lora_alpha"),
        ('{"unet.r": 3, "unet.lora_alpha": 1}', "rank 3"),
        ('{"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}', "config"),
        ('{"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": 7}', "config"),
        ('{"unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": true}', "config"),
        ('{"text_encoder.r": 2}', "says nothing of 'unet'"),
    ):
        with pytest.raises(lk.LorakitError, match=word):
            read(write_file(tmp_path / "c.safetensors", given, lora_adapter_metadata=bad))


@pytest.mark.parametrize("form", ["diffusers", "diffusers-old", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_folded_where_the_file_has_no_place_for_it(net, tmp_path, form, dtype):
    from lorakit.files import adapter_value

    plain = copy.deepcopy(net)
    lk.attach(net, lk.LoRA(rank=3, alpha=2), targets=list(weights_of(net)))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(net):
            parameter.copy_(rand(*parameter.shape).to(dtype))
    write(adapter_value(net), tmp_path / "a.safetensors", form, part="unet")
    lk.load(plain, tmp_path / "a.safetensors")
    assert_close(plain(INPUT), net(INPUT))


def test_dotted_damage(net, tmp_path):
    tensors, _ = made(net, METHODS["without_alpha"])
    base = dotted(tensors, "unet.", new)
    stem = "unet.down_blocks.0.to_q"
    for change, word in (
        ({f"{stem}.lora_B.bias": rand(7)}, "adds (7,)"),
        ({f"{stem}.lora_B.bias": rand(8, 1)}, "is no bias"),
        ({"unet.nowhere.lora_B.bias": rand(8)}, "is no bias"),
        ({f"{stem}.alpha": torch.tensor(torch.nan)}, "alpha is nan"),
        ({f"{stem}.lora_A.default.weight": rand(2, 6)}, "under another name"),
        ({f"{stem}.lora.down.weight": rand(2, 6)}, "under another name"),
        ({f"{stem}.lora_A.weight": rand(1, 6)}, "different ranks"),
        ({f"{stem}.lora_A.weight": torch.ones(2)}, "no two factors"),
        ({f"{stem}.lora_embedding_A": torch.ones(2)}, "cannot be held"),
        ({".lora_A.weight": rand(2, 6)}, "lacks the factor B"),
    ):
        path = write_file(tmp_path / "a.safetensors", {**base, **change})
        with refused(net, word):
            lk.load(net, path)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(tmp_path, prefix):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    block = nn.ModuleDict({"img_attn": Attention(), "txt_attn": Attention()})
    model = nn.ModuleDict({"double_blocks": nn.ModuleList([block])})
    tensors = {
        f"{prefix}double_blocks.0.processor.{which}_lora{stream}.{end}.weight": rand(*shape, seed=int(stream))
        for which, d in (("qkv", 12), ("proj", 4))
        for stream in "12"
        for end, shape in (("down", (2, 4)), ("up", (d, 2)))
    }
    path = write_file(tmp_path / "a.safetensors", tensors)
    value = renamed_for(read(path), model)
    assert value.format == "xlabs"
    write(value, tmp_path / "native.safetensors")
    x, before = rand(3, 4), model["double_blocks"][0]["txt_attn"].qkv(rand(3, 4))
    lk.load(model, path)
    key = f"{prefix}double_blocks.0.processor.qkv_lora2"
    delta = tensors[f"{key}.up.weight"] @ tensors[f"{key}.down.weight"]
    assert_close(model["double_blocks"][0]["txt_attn"].qkv(x), before + x @ delta.t())
    tensors["single_blocks.0.processor.qkv_lora.down.weight"] = rand(2, 4)
    with pytest.raises(lk.LorakitError, match=r"first rows of single_blocks.0.linear1"):
        read(write_file(tmp_path / "b.safetensors", tensors))
