"""Files as they lie about: keys that PEFT's own function did not save, configs of its versions, failed fetches."""

import gzip
import json
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read

CONFIG: dict[str, Any] = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/model", "bias": "none"},
    **{"r": 2, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "modules_to_save": None},
    **{"inference_mode": True, "fan_in_fan_out": False},
}
TENSORS = "adapter_model.safetensors"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    b"4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 134235048\n"
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


@contextmanager
def refused(*words: str):
    """The block raises a LorakitError that holds all these words."""
    with pytest.raises(lk.LorakitError) as caught:
        yield caught
    assert all(word in str(caught.value) for word in words), caught.value


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()}) for _ in range(2)])
        self.score = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["self_attn"](x)
        return self.score(x)


def factors() -> dict[str, Tensor]:
    """Rank 2 on both projections of both layers, under the keys that PEFT saves."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"base_model.model.layers.{i}.self_attn.{own}.lora_{end}.weight": torch.randn(shape, generator=generator)
        for i in range(2)
        for own in ("q_proj", "v_proj")
        for end, shape in (("A", (2, 4)), ("B", (4, 2)))
    }


def directory(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(factors() if tensors is None else tensors, path / TENSORS)
    return path


def keyed(change) -> dict[str, Tensor]:
    return {change(key): tensor for key, tensor in factors().items()}


@pytest.mark.parametrize(
    "change",
    {
        "its name in the keys": lambda key: key.replace(".weight", ".default.weight"),
        "another name": lambda key: key.replace(".weight", ".sql-2.weight"),
        "compiled outside": lambda key: f"_orig_mod.{key}",
        "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        "DDP": lambda key: f"module.{key}",
        "FSDP": lambda key: f"_fsdp_wrapped_module.{key}".replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "checkpointing": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        "add_adapter": lambda key: key.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
        "no prefix": lambda key: key.removeprefix("base_model.model."),
    }.items(),
    ids=lambda change: change[0],
)
def test_keys_of_a_raw_state_dict_are_those_of_peft(tmp_path, change):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 4)
    lk.load(model, directory(tmp_path / "saved"), "saved")
    expected = model(x)
    lk.remove(model, "saved")
    path = directory(tmp_path / "raw", keyed(change[1]))
    lk.load(model, path, "raw")
    assert torch.equal(model(x), expected)
    assert [weight.name for weight in read(path).weights] == [
        weight.name for weight in read(tmp_path / "saved").weights
    ]


@pytest.mark.parametrize("inside", ["modules_to_save.default.", "modules_to_save."])
def test_whole_modules_of_a_raw_state_dict(tmp_path, inside):
    torch.manual_seed(0)
    model, x, score = Model().eval(), torch.randn(3, 4), nn.Linear(4, 3)
    head = {f"base_model.model.score.{inside}{name}": value.detach() for name, value in score.named_parameters()}
    base = {f"base_model.model.score.original_module.{name}": torch.ones(3) for name in ("weight", "bias")}
    path = directory(tmp_path, {**factors(), **head, **base}, modules_to_save=["score"])
    adapter = read(path)
    assert {weight.name for weight in adapter.weights} >= {"score.weight", "score.bias"}
    assert len(adapter.left_out) == 2
    with pytest.warns(UserWarning, match=r"original_module\.weight"):
        lk.load(model, path)
    assert torch.equal(model.score.weight, score.weight)
    assert_close(model(x), score(model.layers[1]["self_attn"](model.layers[0]["self_attn"](x))))


def test_several_adapters_in_one_file_are_named(tmp_path):
    both = keyed(lambda key: key.replace(".weight", ".a.weight")) | keyed(
        lambda key: key.replace(".weight", ".b.weight")
    )
    with refused("several adapters", "'a'", "'b'"):
        read(directory(tmp_path, both))


def test_one_layer_under_two_names_is_refused(tmp_path):
    twice = factors() | keyed(lambda key: f"module.{key}")
    with refused("under two names", "module.base_model"):
        read(directory(tmp_path, twice))


def test_a_model_with_a_layer_called_module_keeps_it(tmp_path):
    wrapped = keyed(lambda key: key.replace("base_model.model.", "base_model.model.module."))
    assert read(directory(tmp_path, wrapped)).weights[0].name == "module.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_lora": None, "merge_weights": False, "lora_alpha": 8.0},  # PEFT 0.2
        {"merge_weights": True},
        {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": True},
        {"corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"direction": "ArB2r"}},  # after its conversion
        {"alora_invocation_tokens": None, "arrow_config": None, "use_bdlora": None, "kasa_config": None},
        {"velora_config": None, "use_new": False, "new_config": {}, "new_names": []},  # of versions to come
        {"modules_to_save": [], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": r".*self_attn\.(q_proj|v_proj)$"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_configs_of_many_versions(tmp_path, fields):
    adapter = read(directory(tmp_path, **fields))
    assert len(adapter.weights) == 4
    assert adapter.variant.scale == 4


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"enable_lora": [True, False, True]},
            {"init_lora_weights": "loftq"},
            {"init_lora_weights": "pissa_niter_16"},
        ),
        *({"use_qalora": True}, {"layer_replication": [[0, 2], [1, 3]]}, {"alora_invocation_tokens": [1]}),
        *({"arrow_config": {"k": 3}}, {"use_bdlora": {"nblocks": 2}}, {"use_new": True}),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_changes_the_meaning_is_refused_by_name(tmp_path, fields):
    with refused(next(iter(fields))):
        read(directory(tmp_path, **fields))


@pytest.mark.parametrize("targets", [["query", "value"], ["q_proj"]])
def test_a_config_of_another_adapter_is_noticed(tmp_path, targets):
    with refused("config of another adapter", "v_proj"):
        read(directory(tmp_path, target_modules=targets))


def test_a_config_with_a_byte_order_mark(tmp_path):
    path = directory(tmp_path) / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(tmp_path).weights) == 4


@pytest.mark.parametrize(
    "key", ["layers.0.attention.wq", "model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn"]
)
def test_factors_of_a_language_model_have_no_scale_of_1_for_want_of_another(tmp_path, key):
    """Diffusers defines that a file without alpha has scale 1; PEFT and others do not."""
    file = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}, file)
    assert (read(file).format, read(file).missing) == ("peft", ("alpha",))
    assert read(file, alpha=8).weights[0].variant.scale == 4
    assert read(file, alpha=8).weights[0].name == f"{key}.weight"


@pytest.mark.parametrize("name", [TENSORS, "adapter_config.json", "adapter_model.bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, ("pointer of git-lfs", "134,235,048", "git lfs pull")),
        (PAGE, ("web page",)),
        (b"", ("is empty",)),
        (gzip.compress(b"1234", mtime=0), ("gzip", "unpack")),
    ],
    ids=["git-lfs", "web page", "empty", "gzip"],
)
def test_what_was_not_fetched_is_told_as_such(tmp_path, name, content, words):
    directory(tmp_path)
    if name.endswith(".bin"):
        (tmp_path / TENSORS).unlink()
    (tmp_path / name).write_bytes(content)
    with refused(name, *words):
        read(tmp_path)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.gguf", "adapters.npz"])
def test_a_pointer_is_one_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with refused("git-lfs"):
        read(tmp_path / name)
    with refused("git-lfs"):
        lk.renamed_for(read(directory(tmp_path / "good")), tmp_path / name)


def test_messages_and_archives_in_the_place_of_tensors(tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b'{"error":"Repository not found"}')
    with refused("text", "Repository not found"):
        read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(TENSORS, b"")
    with refused("zip archive of", TENSORS, "unpack"):
        read(file)
    file.write_bytes(b"algg" + bytes(64))
    with refused("ggla", "GGUF"):
        read(file)
    torch.save(nn.Linear(2, 2), tmp_path / "module.bin")
    with refused("torch.nn.modules.linear.Linear", "code") as error:
        read(tmp_path / "module.bin")
    assert "weights_only" not in str(error.value)


def test_a_config_without_its_tensors(tmp_path):
    (directory(tmp_path) / TENSORS).unlink()
    with refused("without the tensors"):
        read(tmp_path)


def sharded(path: Path) -> Path:
    directory(path)
    tensors = load_file(path / TENSORS)
    (path / TENSORS).unlink()
    keys = list(tensors)
    names = {key: f"adapter_model-0000{1 + (i > 2)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in keys if names[key] == name}, path / name)
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def test_an_adapter_in_several_files(tmp_path):
    torch.manual_seed(0)
    whole = read(directory(tmp_path / "whole")).state_dict()
    found = read(sharded(tmp_path / "sharded"))
    assert found.format == "peft"
    assert found.state_dict().keys() == whole.keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in whole.items())
    (tmp_path / "sharded" / "adapter_model.safetensors.index.json").unlink()
    assert len(read(tmp_path / "sharded").weights) == 4


def test_parts_that_are_missing_doubled_or_not_in_the_index(tmp_path):
    path = sharded(tmp_path / "gone")
    (path / "adapter_model-00002-of-00002.safetensors").unlink()
    with refused("lacks number 2", "not in the files"):
        read(path)
    path = sharded(tmp_path / "double")
    save_file(factors(), path / "adapter_model-00002-of-00002.safetensors")
    with refused("is in adapter_model-00001", "adapter_model-00002"):
        read(path)
    path = sharded(tmp_path / "index")
    (path / "adapter_model.safetensors.index.json").write_text('{"weight_map": {}}')
    with refused("not in its index"):
        read(path)
    path = sharded(tmp_path / "all")
    for part in path.glob("adapter_model-*"):
        part.unlink()
    with refused("parts are missing"):
        read(path)


@pytest.mark.parametrize("name", ["0000100_adapters.safetensors", "0000100_adapters.npz"])
def test_a_state_of_an_mlx_run_has_the_scale_of_its_config(tmp_path, name):
    factors = {"model.layers.0.q.lora_a": torch.ones(4, 2), "model.layers.0.q.lora_b": torch.ones(2, 4)}
    if name.endswith(".npz"):
        np.savez(tmp_path / name, **{key: tensor.numpy() for key, tensor in factors.items()})
    else:
        save_file(factors, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"rank": 2, "scale": 20.0}}')
    assert read(tmp_path / name).weights[0].variant.scale == 20
    with refused(name, "name the one that is meant"):
        read(tmp_path)


def test_one_reason_for_many_weights_is_one_line(tmp_path):
    tensors = {
        f"base_model.model.layers.{i}.q_proj.lora_{end}.weight": torch.ones(shape)
        for i in range(100)
        for end, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    with refused("layers.0.q_proj", "and 94 more", "rank 4") as caught:
        read(directory(tmp_path, tensors, r=4))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        (
            {"fine_tune_type": "lora", "num_layers": 16, "optimizer": "adam"},
            10.0,
        ),  # alpha stands there, and is not used
        ({"num_layers": 8}, 10.0),
        ({"lora_layers": 32, "use_dora": False}, None),  # one version multiplied by alpha/rank, the next did not
    ],
)
def test_alpha_beside_the_scale_in_configs_of_mlx(tmp_path, fields, scale):
    factors = {"model.layers.0.q.lora_a": torch.ones(4, 2), "model.layers.0.q.lora_b": torch.ones(2, 4)}
    save_file(factors, tmp_path / "adapters.safetensors")
    given = {**fields, "lora_parameters": {"rank": 2, "alpha": 16, "dropout": 0.0, "scale": 10.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    adapter = read(tmp_path)
    assert adapter.missing == (() if scale else ("alpha",))
    assert scale is None or adapter.weights[0].variant.scale == scale
