"""Whatever lies in a file of image models' adapters: it is read, or refused by a `LorakitError`."""

import copy
import warnings

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import METHODS, OF_KERNELS, Net, kohya, made, write_file

import lorakit as lk
from lorakit.exchange import read, renamed_for, write

NET = Net()
ENDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def files():
    """Files of every form."""
    for method in (*METHODS.values(), *OF_KERNELS.values()):
        parts, _ = made(NET, method)
        yield kohya(parts)
        yield {f"unet.{layer}.{ENDS.get(end, end)}": t for layer, each in parts.items() for end, t in each.items()}
        yield {f"diffusion_model.{layer}.{end}": t for layer, each in parts.items() for end, t in each.items()}
    up, down = torch.ones(8, 2), torch.ones(2, 6)
    yield {"unet:0:up": up, "unet:0:down": down, "unet:1:up": torch.ones(6, 2), "unet:1:down": torch.ones(2, 8)}
    yield {"a.processor.qkv_lora1.up.weight": up, "a.processor.qkv_lora1.down.weight": down}
    yield {"unet.a.processor.to_q_lora.up.weight": up, "unet.a.processor.to_q_lora.down.weight": down}


FILES = list(files())
STRANGE = [
    torch.tensor(1.0),
    torch.tensor(float("nan")),
    torch.tensor([]),
    torch.ones(2),
    torch.ones(3, 1),
    torch.ones(1, 1, 1),
    torch.ones(0, 4, 3, 3),
    torch.ones(2, 2, 2, 2, 2),
    torch.full((2, 6), float("inf")),
    torch.ones(2, 6, dtype=torch.int64),
    torch.ones(2, 6, dtype=torch.bool),
    torch.ones(2, 6, dtype=torch.complex64),
    torch.ones(2, 6, dtype=torch.float64),
    torch.ones(2, 6).to(torch.float8_e4m3fn),
    torch.ones(1, 1, 40, 40),
    torch.ones(2, 70000),
]
METADATA = [
    '{"unet.r": 2, "unet.lora_alpha": 1}',
    "[]",
    "{",
    '{"r": 1e999}',
    '{"r": "x", "lora_alpha": []}',
    '{"unet.r": 0}',
]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_only_errors_of_ours(tmp_path_factory, data):
    tensors = dict(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        match data.draw(st.integers(0, 4)):
            case 0:
                tensors[key] = data.draw(st.sampled_from(STRANGE))
            case 1 if len(tensors) > 1:
                del tensors[key]
            case 2:
                other = data.draw(st.sampled_from(sorted(tensors)))
                tensors[key], tensors[other] = tensors[other], tensors[key]
            case 3:
                stem, dot, end = key.partition(".")
                tensors[
                    data.draw(st.sampled_from([dot + end, stem, f"{key}.x", f"x.{key}", key.replace(".", "..")]))
                ] = tensors.pop(key)
            case _:
                stem = key.rpartition(".")[0]
                tensors[f"{stem}.{data.draw(st.sampled_from(['alpha', 'dora_scale', 'diff', 'lokr_t2', 'bias']))}"] = (
                    data.draw(st.sampled_from(STRANGE))
                )
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    more = {"lora_adapter_metadata": data.draw(st.sampled_from(METADATA))} if data.draw(st.booleans()) else {}
    write_file(path, tensors, unet='["Block"]', **more)
    model = copy.deepcopy(NET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (
            lambda: lk.load(model, path),
            lambda: write(read(path), path.with_name("b.safetensors"), "kohya", part="unet"),
            lambda: write(renamed_for(read(path), NET), path.with_name("c.safetensors"), "comfyui"),
            lambda: write(renamed_for(read(path), NET), path.with_name("d.safetensors"), "diffusers", part="unet"),
        ):
            try:
                step()
            except lk.LorakitError:
                continue
