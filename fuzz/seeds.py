"""Small valid files of every format, for a fuzzer to begin with: those that are written here, and those only read."""

import io
import json

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import lorakit as lk
from fuzz.models import HEADS, LLAMA, UNET, WIDTH, Model, layers
from fuzz.readers import FILES, pack
from lorakit.formats import FORMATS, Known

_KNOWN = Known(part="unet", arch="llama", heads=HEADS, kv_heads=HEADS)


def adapters() -> dict[str, lk.Adapter]:
    """Adapters of every method, on layers of several kinds, on those of a Llama and on those of a UNet."""
    made = {}
    llama = [f"model.layers.0.{name}" for name in LLAMA]
    unet = [f"{UNET}.{name}" for name in ("to_q", "to_k")]
    for variant in (lk.LoRA(2, alpha=3), lk.DoRA(1), lk.LoHa(1), lk.LoKr(1), lk.VeRA(2), lk.AdaLoRA(2)):
        name = type(variant).__name__
        made[f"{name}-0"] = _attached(variant, ["unet.0"])
        made[f"{name}-unet"] = _attached(variant, unet)
        if type(variant) in (lk.LoRA, lk.DoRA):
            made[f"{name}-mixed"] = _attached(variant, ["unet.0", "unet.1", "words"])
            made[f"{name}-llama"] = _attached(variant, llama)
    made["stack"] = _attached(lk.LoRA(2), ["unet.0", "experts.up"])
    made["slices"] = _attached(lk.LoRA(2), ["unet.0"], train_also=["unet.1"], train_rows={"words": [1, 3]})
    made["ranks"] = _attached({"unet.0": lk.LoRA(2, alpha=5), f"{UNET}.to_q": lk.LoRA(1, dropout=0.5)}, [])
    return made


def _attached(variant: "lk.Variant | dict[str, lk.Variant]", targets: list[str], **more: object) -> lk.Adapter:
    torch.manual_seed(0)
    base = Model(layers())
    if isinstance(variant, dict):
        values = [_attached(each, [name]) for name, each in variant.items()]
        return sum(values[1:], values[0])
    lk.attach(base, variant, targets, **more)  # type: ignore[arg-type]
    for parameter in lk.adapter_parameters(base):
        nn.init.normal_(parameter)
    return lk.adapter_value(base)


def seeds() -> dict[str, bytes]:
    """Inputs by a name, each of which is read as an adapter or checkpoint; and some that are none."""
    found = {"empty": pack({FILES[0]: b""}), "text": pack({FILES[0]: b"not a file of tensors"})}
    for name, adapter in adapters().items():
        for form in FORMATS.values():
            if form.write is None:
                continue
            try:
                written = form.write(adapter, _KNOWN)
            except lk.LorakitError:
                continue
            files = {_name(each): content for each, content in written.files.items()}
            if form.name == "litgpt":
                files["model_config.yaml"] = f"n_head: {HEADS}\nn_query_groups: {HEADS}\nhead_size: 4\n".encode()
            found[f"{form.name}-{name}"] = pack(files)
    return {**found, **{name: pack(files) for name, files in {**_read_only(), **_checkpoints()}.items()}}


def _name(name: str) -> str:
    return name if name in FILES else next((each for each in FILES if each.endswith(name[-4:])), FILES[0])


def _pair(down: str, up: str, width: int = WIDTH) -> dict[str, Tensor]:
    return {down: torch.ones(2, width), up: torch.ones(width, 2)}


def _read_only() -> dict[str, dict[str, bytes]]:
    """Files of formats that are read and never written, or in containers that are not."""
    import numpy as np

    numbered = _pair("unet:0:down", "unet:0:up")
    flux = "double_blocks.0.processor.qkv_lora1"
    q = f"unet.{UNET}.to_q"
    stream = io.BytesIO()
    np.savez(stream, **{f"{q}.lora_a": np.ones((WIDTH, 2), "f4"), f"{q}.lora_b": np.ones((2, WIDTH), "f4")})
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}, "num_layers": 1}
    listed = io.BytesIO()
    torch.save([torch.ones(WIDTH, 2), torch.ones(2, WIDTH)], listed)
    peft = {f"base_model.model.unet.0.lora_{x}.weight": t for x, t in zip("AB", _pair("A", "B").values(), strict=True)}
    stacked = {
        "base_model.model.experts.lora_A.weight": torch.ones(6, 4),
        "base_model.model.experts.lora_B.weight": torch.ones(5, 6),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["unet.0"], "lora_dropout": 0.1}
    patterns = {"rank_pattern": {"^unet\\.0": 2, "(q|k)_proj": 3}, "alpha_pattern": {".*\\.0": 8}, "use_rslora": True}
    parameters = {**config, "target_modules": [], "target_parameters": ["experts.up"]}
    bias = {**peft, "base_model.model.unet.0.base_layer.bias": torch.ones(WIDTH)}
    diffusers = {f"unet.{UNET}.to_q.lora_{x}.weight": t for x, t in zip("AB", _pair("A", "B").values(), strict=True)}
    said = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    return {
        "cloneofsimo": {
            FILES[0]: to_safetensors(numbered, {"unet": json.dumps(["Attention", "GEGLU"]), "unet:0:rank": "2"})
        },
        "cloneofsimo-list": {"adapter_model.bin": listed.getvalue()},
        "xlabs": {FILES[0]: to_safetensors(_pair(f"{flux}.down.weight", f"{flux}.up.weight"))},
        "mlx-npz": {"adapters.npz": stream.getvalue(), "adapter_config.json": json.dumps(mlx).encode()},
        "npz-alone": {"adapters.npz": stream.getvalue()},
        "peft-patterns": {
            FILES[0]: to_safetensors(peft),
            "adapter_config.json": json.dumps(config | patterns).encode(),
        },
        "peft-parameters": {FILES[0]: to_safetensors(stacked), "adapter_config.json": json.dumps(parameters).encode()},
        "peft-bias": {
            FILES[0]: to_safetensors(bias),
            "adapter_config.json": json.dumps({**config, "bias": "lora_only", "modules_to_save": ["words"]}).encode(),
        },
        "peft-bare": {FILES[0]: to_safetensors(peft)},
        "diffusers-config": {"pytorch_lora_weights.safetensors": to_safetensors(diffusers, said)},
    }


def _checkpoints() -> dict[str, dict[str, bytes]]:
    """Whole weights: in shards, and as torch saves them, with views."""
    first, second = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}, {"b.weight": torch.ones(2, 2)}
    where = {**dict.fromkeys(first, "model-1.safetensors"), **dict.fromkeys(second, "model-2.safetensors")}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save({**first, "turned": first["a.weight"].t(), "row": first["a.weight"][1]}, new)
    torch.save(first, old, _use_new_zipfile_serialization=False)
    return {
        "shards": {
            "model-1.safetensors": to_safetensors(first),
            "model-2.safetensors": to_safetensors(second, {"tied.weight": "b.weight"}),
            "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": where}).encode(),
        },
        "torch": {"pytorch_model.bin": new.getvalue()},
        "torch-old": {"pytorch_model.bin": old.getvalue()},
    }
