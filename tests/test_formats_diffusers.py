"""diffusers itself as the oracle: its models give the same outputs with the same file, in both directions."""

import copy
import json
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import dense
from image_files import content, rand, write_file
from safetensors import safe_open
from torch import nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import Names
from lorakit.formats.flattened import fitting_names, flatten
from lorakit.formats.ldm import as_diffusers

if sys.version_info < (3, 11):
    pytest.skip("diffusers needs Python 3.11", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import peft
    import transformers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
DISNEY = SHARED / "adapters" / "cloneofsimo-lora" / "lora_disney.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore")

CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=6, attention_head_dim=2,
        norm_num_groups=4, **CROSS,
    )  # fmt: skip
    return model.eval(), (rand(1, 4, 8, 8), torch.tensor([3]), rand(1, 5, 6))


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    ids = torch.zeros(7, 3)
    return model.eval(), (rand(1, 4, 4), rand(1, 3, 6), rand(1, 5), torch.tensor([0.5]), ids[:4], ids[:3])


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=6,
        caption_projection_dim=16, pooled_projection_dim=5, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return model.eval(), (rand(1, 4, 8, 8), rand(1, 3, 6), rand(1, 5), torch.tensor([3]))


MODELS = {"unet": unet, "transformer": flux, "transformer ": sd3}


def targets(model):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [n for n in names if n.rpartition(".")[2] in ("to_q", "to_v", "0", "add_q_proj", "proj_out", "conv1")]


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs, return_dict=False)[0]


def close(a, b):
    assert (a - b).abs().max().item() <= 1e-6 * max(1.0, b.abs().max().item())


def trained(model, variant):
    """An adapter with noise in it, on attention and convolutions."""
    lk.attach(model, variant, targets=targets(model))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter.add_(rand(*parameter.shape) * 0.5)
    return adapter_value(model)


def theirs(model, path, part, **more):
    """Loaded by diffusers."""
    tensors = content(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    if text is not None:
        more["metadata"] = json.loads(text)
    model.load_lora_adapter(tensors, prefix=part, **more)
    return model


@pytest.mark.parametrize("form", ["diffusers", "diffusers-old"])
@pytest.mark.parametrize("variant", [lk.LoRA(2), lk.LoRA(3, alpha=1), lk.LoRA(2, init="pissa"), lk.DoRA(2, alpha=3)])
@pytest.mark.parametrize("part", MODELS)
def test_diffusers_computes_the_same_with_our_file(tmp_path, part, variant, form):
    model, inputs = MODELS[part]()
    plain, part = copy.deepcopy(model), part.strip()
    value = trained(model, variant)
    before = run(plain, inputs)
    assert (run(model, inputs) - before).abs().max() > 1e-4
    if form == "diffusers-old" and isinstance(variant, lk.DoRA):
        with pytest.raises(lk.LorakitError, match="came later"):
            write(value, tmp_path / "a.safetensors", form, part=part)
        return
    write(value, tmp_path / "a.safetensors", form, part=part)
    mine = copy.deepcopy(plain)
    lk.load(mine, tmp_path / "a.safetensors")
    close(run(mine, inputs), run(model, inputs))
    close(run(theirs(plain, tmp_path / "a.safetensors", part), inputs), run(model, inputs))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("part", MODELS)
def test_we_compute_the_same_with_their_file(tmp_path, part, dora):
    model, inputs = MODELS[part]()
    plain = copy.deepcopy(model)
    first = targets(model)[0]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets(model), use_dora=dora, use_rslora=not dora,
        rank_pattern={f"^{first}": 2}, alpha_pattern={f"^{first}": 7}, init_lora_weights=False,
    )  # fmt: skip
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(rand(*parameter.shape) * 0.3)
    model.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    value = read(file)
    assert value.format == "diffusers"
    lk.load(plain, tmp_path)
    close(run(plain, inputs), run(model, inputs))
    named = renamed_for(value, plain)
    write(named, tmp_path / "b.safetensors", "diffusers", part="unet")
    again = copy.deepcopy(MODELS[part]()[0])
    close(run(theirs(again, tmp_path / "b.safetensors", "unet"), inputs), run(model, inputs))


def test_their_kohya_is_ours(tmp_path):
    model, inputs = unet()
    plain = copy.deepcopy(model)
    value = trained(model, lk.LoRA(3, alpha=1))
    write(value, tmp_path / "a.safetensors", "kohya", part="unet")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(content(tmp_path / "a.safetensors"))
    plain.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    close(run(plain, inputs), run(model, inputs))


@pytest.mark.parametrize("root", ["", "text_model_"])
def test_text_encoders(tmp_path, root):
    small = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, eos_token_id=2)).eval()
    plain = copy.deepcopy(model)
    layers = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "fc1"))]
    tensors, deltas = {}, {}
    for layer in layers:
        d, k = model.get_submodule(layer).weight.shape
        up, down = rand(d, 2), rand(2, k)
        stem = root + flatten(layer.removeprefix("text_model."))
        dots = root.replace("_model_", "_model.") + layer.removeprefix("text_model.")
        tensors[stem], deltas[f"{layer}.weight"] = (down, up, dots), up @ down
    flat = {f"lora_te1_{s}.lora_{e}.weight": t for s, (a, b, _) in tensors.items() for e, t in (("down", a), ("up", b))}
    old = {
        f"text_encoder.{dots}.lora_linear_layer.{e}.weight": t
        for a, b, dots in tensors.values()
        for e, t in (("down", a), ("up", b))
    }
    ids = torch.tensor([[1, 5, 2]])
    wanted = dense(plain, deltas)(ids).last_hidden_state
    for i, each in enumerate((flat, old)):
        again = copy.deepcopy(plain)
        lk.load(again, write_file(tmp_path / f"{i}.safetensors", each), part="text_encoder")
        close(again(ids).last_hidden_state, wanted)


def sdxl():
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16, 16), layers_per_block=2, transformer_layers_per_block=(1, 2, 3),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=6,
            attention_head_dim=2, norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=8,
        )  # fmt: skip


def test_names_of_the_original_unet():
    model = sdxl()
    names = Names.of_model(model)
    flat = {flatten(name) for name in names.layers}
    original = [
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_8_1_proj_in",
        "input_blocks_1_0_in_layers_2",
        "middle_block_1_transformer_blocks_2_attn2_to_k",
        "middle_block_0_out_layers_3",
        "middle_block_2_emb_layers_1",
        "output_blocks_0_1_transformer_blocks_1_ff_net_0_proj",
        "output_blocks_5_1_proj_out",
        "output_blocks_3_0_skip_connection",
        "output_blocks_8_0_in_layers_2",
        "output_blocks_2_1_transformer_blocks_0_attn1_to_v",
        "input_blocks_3_0_op",
        "output_blocks_2_2_conv",
        "time_embed_0",
        "label_emb_0_2",
        "input_blocks_0_0",
        "out_2",
    ]
    mapped = {name: as_diffusers(name, flat) for name in original}
    assert None not in mapped.values() and len(set(mapped.values())) == len(original)
    attention = [name for name in original if "transformer_blocks" in name]

    blocks = {"input_blocks": "down_blocks", "output_blocks": "up_blocks", "middle_block": "mid_block"}
    for name in attention:  # their mapping, of which the blocks' names are a second step
        (key,) = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{name}.x": 1}, SimpleNamespace(layers_per_block=2))
        for theirs, word in blocks.items():
            key = key.replace(theirs, word)
        assert key == f"lora_unet_{mapped[name]}.x"


def every_original_name(model):
    """The inverse, of every layer, from the two ways of counting."""
    inside = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
    inside |= {"conv_shortcut": "skip_connection", "norm1": "in_layers_0", "norm2": "out_layers_0"}
    for name in Names.of_model(model).layers:
        found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name)
        if found:
            way, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            number = 3 * level + layer + (way == "down")
            yield (
                name,
                f"{'in' if way == 'down' else 'out'}put_blocks_{number}_{int(kind == 'attentions')}_"
                + flatten(inside.get(rest, rest)),
            )


def test_every_layer_of_the_original_unet_is_found():
    model = sdxl()
    pairs = dict(every_original_name(model))
    weights = [n for n in pairs if model.get_submodule(n).weight is not None]
    assert len(weights) > 100

    mine = {pairs[name]: SimpleNamespace(entry=SimpleNamespace(path=name)) for name in weights}
    problems: list[str] = []
    found = fitting_names(mine, Names.of_model(model), problems)
    assert not problems and found == {pairs[name]: name for name in weights}


@pytest.mark.skipif(not DISNEY.is_file(), reason=f"no {DISNEY}")
def test_a_real_numbered_file_fits_the_real_shapes():
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        )
    value = read(DISNEY)
    named = renamed_for(value, model)
    assert len(named.weights) == 144 and named.left_out == ("<s1>", "<s2>", "48 weights of 'text_encoder'")
    names = [weight.entry.path for weight in named.weights]
    assert {n.rpartition(".")[2] for n in names} == {"to_q", "to_k", "to_v", "0", "proj"}
    by_name = {weight.entry.path: weight.tensors for weight in named.weights}
    tensors = content(DISNEY)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for number, layer in ((0, "attn1.to_q"), (4, "ff.net.0.proj"), (5, "attn2.to_q"), (8, "attn2.to_out.0")):
        assert torch.equal(by_name[f"{block}.{layer}"]["B"], tensors[f"unet:{number}:up"])
    assert torch.equal(by_name["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]["A"], tensors["unet:135:down"])
    encoder = renamed_for(value, text)
    assert len(encoder.weights) == 48
    assert torch.equal(
        next(w.tensors["A"] for w in encoder.weights if w.entry.path.endswith("layers.0.self_attn.k_proj")),
        tensors["text_encoder:0:down"],
    )
