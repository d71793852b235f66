"""Files, containers and configs that were made to do harm: pipes, bombs, names that act on a terminal, absurd sizes."""

import json
import os
import struct
import warnings

import pytest
import torch
from helpers import attached, refused
from models import mlp
from safetensors.torch import load_file, save_file
from test_hostile import A, B, adapter, both, entry, safetensors, told  # noqa: F401

import lorakit as lk
from lorakit.checkpoints.opening import open_checkpoint
from lorakit.cli.common import show_table
from lorakit.errors import printable
from lorakit.tables import table
from lorakit.values.inspection import inspect


@pytest.fixture
def litgpt(tmp_path):
    """A directory of LitGPT without its config."""
    torch.save(
        {"lm_head.lora_A": torch.ones(2, 6), "lm_head.lora_B": torch.ones(8, 2)}, tmp_path / "lit_model.pth.lora"
    )
    return tmp_path


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.npz", "a.gguf"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    both(tmp_path / name, name, "not a file")
    if name == "a.gguf":
        both(tmp_path, name, "not a file")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with told(name, "not a file"):
        open_checkpoint(tmp_path / name)


LEVELS = "\n".join(
    ["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)), "lora_r: *a29"]
)
MERGED = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)), "lora_r: 2"]
)
YAML = {
    "laughs": LEVELS,
    "merged laughs": MERGED,
    "in itself": "lora_r: &a [*a]",
    "deep": "[" * 20_000,
    "large": "a: [" + "1, " * 2**20 + "1]",
    "python": "lora_r: !!python/object/apply:os.getcwd []",
    "a key that is a list": "? [a]\n: 1",
    "a long number": "lora_r: 0x" + "f" * 10_000,
    "a long number to the base of 60": "lora_r: 1" + ":59" * 10_000,
    "a list": "- 1",
    "twice": "lora_alpha: 1\nlora_alpha: 1000",
}


@pytest.mark.parametrize("what", YAML)
def test_configs_in_yaml_that_were_made_to_do_harm(what, litgpt):
    (litgpt / "hyperparameters.yaml").write_text(YAML[what])
    both(litgpt, "hyperparameters.yaml")


def test_a_config_in_yaml_may_refer_to_its_own_values(litgpt):
    (litgpt / "hyperparameters.yaml").write_text("a: &a {b: 1}\nc: *a\nd: *a\nlora_r: 2\nlora_alpha: 6\n")
    assert lk.read(litgpt).variant == lk.LoRA(2, alpha=6)


@pytest.mark.parametrize(
    "text", ['{"r": 2, "lora_alpha": 4, "lora_alpha": 400}', '{"peft_type": "LORA", "a": {"b":1,"b":2}}']
)
def test_a_config_with_a_key_twice_is_refused(text, adapter):  # noqa: F811
    (adapter / "adapter_config.json").write_text(text)
    both(adapter, "adapter_config.json", "twice")


def test_a_header_with_a_key_twice_is_refused(tmp_path):
    lk.save(attached(mlp(), targets=["0"]), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    weight = '{"path":"0","parameter":"weight","mode":"beside","shape":null,"dtype":null,"sample":null}'
    variant = '{"type":"LoRA","rank":2,"alpha":1,"alpha":1000}'
    text = f'{{"version":1,"name":"a","variant":{variant},"weights":[{weight}]}}'
    save_file(tensors, tmp_path / "a.safetensors", {"lorakit": text})
    both(tmp_path / "a.safetensors", "'alpha' twice")


def test_a_tensor_twice_at_one_place_in_two_shapes_is_refused(tmp_path):
    one, other = json.dumps(entry([2, 6], 0, 48)), json.dumps(entry([6, 2], 0, 48))
    (tmp_path / "a.safetensors").write_bytes(safetensors(f'{{"{A}":{one},"{A}":{other}}}'.encode(), bytes(48)))
    both(tmp_path / "a.safetensors", "a.safetensors")


def header(variant, **more):
    weight = {"path": "0", "parameter": "weight", "mode": "beside", "shape": None, "dtype": None, "sample": None}
    return {"lorakit": json.dumps({"version": 1, "name": "a", "variant": variant, "weights": [weight], **more})}


def test_shared_matrices_far_larger_than_the_model_are_not_made(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"base_model.model.0.vera_lambda_d": torch.ones(64), "base_model.model.0.vera_lambda_b": torch.ones(8)}
    save_file(tensors, path, header({"type": "VeRA", "rank": 64, "sizes": [2**24, 2**24]}))
    with told("a.safetensors", "sizes=(16777216, 16777216)"):
        lk.load(mlp(), path)


def test_shared_matrices_in_a_file_are_compared_by_their_shapes_first(tmp_path):
    tensors = {
        **{"base_model.model.0.vera_lambda_d": torch.ones(2), "base_model.model.0.vera_lambda_b": torch.ones(8)},
        **{"base_model.vera_A": torch.ones(2, 1), "base_model.vera_B": torch.ones(2**20, 1)},
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "VERA", "r": 4096, "projection_prng_key": 0, "target_modules": ["0"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    both(tmp_path, "vera_B (1048576, 1)")


def test_factors_with_axes_too_many_are_refused(tmp_path):
    save_file(
        {A: torch.ones(1, 6), B: torch.ones(1, 1, 2, 8)},
        tmp_path / "a.safetensors",
        header({"type": "LoRA", "rank": 1}),
    )
    both(tmp_path / "a.safetensors", "0")


def test_a_diagonal_of_another_shape_is_refused(tmp_path):
    tensors = {
        f"base_model.model.0.lora_{name}": torch.ones(size)
        for name, size in zip("ABE", ((2, 6), (8, 2), (1, 2)), strict=True)
    }
    save_file(tensors, tmp_path / "a.safetensors", header({"type": "AdaLoRA", "rank": 2}))
    both(tmp_path / "a.safetensors", "0")


def test_one_factor_without_a_config_is_refused(tmp_path):
    save_file({A: torch.ones(2, 6), B: torch.ones(8, 2), B + "0": torch.ones(8, 2)}, tmp_path / "a.safetensors")
    with refused(mlp(), "lora_B"):
        lk.load(mlp(), tmp_path / "a.safetensors", alpha=1)
    stray = {A: torch.ones(2, 6), B: torch.ones(8, 2), "base_model.model.1.lora_B.weight": torch.ones(8, 2)}
    save_file(stray, tmp_path / "a.safetensors")
    with told("a.safetensors", "1"):
        lk.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("facts", [{"peft": 5}, {"peft": {"base_model_name_or_path": ["x"]}}, {"base": 7}])
def test_what_a_header_says_of_the_base_may_be_anything(facts, tmp_path):
    save_file(
        {A: torch.ones(2, 6), B: torch.ones(8, 2)},
        tmp_path / "a.safetensors",
        header({"type": "LoRA", "rank": 2}, facts=facts),
    )
    assert inspect(lk.read(tmp_path / "a.safetensors")).base is None


def test_the_name_of_a_base_is_shown_in_part_and_acts_on_no_terminal(adapter):  # noqa: F811
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "\x1b[31m" * 2**20
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = inspect(lk.read(adapter)).base
    assert base.isprintable() and len(base) < 2000


def test_factors_of_parameters_can_be_looked_at(tmp_path):
    pair = {"base_model.model.m.lora_A.weight": torch.ones(6, 4), "base_model.model.m.lora_B.weight": torch.ones(5, 6)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["m.up"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (weight,) = inspect(lk.read(tmp_path)).weights
    assert weight.spectrum is None and weight.state == ""


@pytest.mark.parametrize("file", [5, ["a"], "x" * 10_000, "../x", "..", "/etc/passwd", "a\0", "a\\b", ""])
def test_an_index_that_leads_elsewhere(file, tmp_path):
    text = json.dumps({"weight_map": {"a.weight": file, "b.weight": "missing.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with told("model.safetensors.index.json", "missing.safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_is_an_error(tmp_path):
    save_file({"a": torch.ones(10_000)}, tmp_path / "m.safetensors")
    found = open_checkpoint(tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", 1000)
    for read in (found.read, found.fingerprint, lambda name: list(found.pieces(name))):
        with told("m.safetensors"):
            read("a")


def test_errors_are_bounded_and_name_the_first_and_the_count(tmp_path):
    names = [f"base_model.model.{i}.lora_A.weight" for i in range(5000)]
    content = {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    (tmp_path / "a.safetensors").write_bytes(safetensors(content, bytes(4 * len(names))))
    with told("'0.weight'", "more", seconds=20):
        lk.read(tmp_path / "a.safetensors", alpha=1)
    save_file({A + "x" * 10**6: torch.ones(2, 6)}, tmp_path / "b.safetensors")
    with told("b.safetensors"):
        lk.read(tmp_path / "b.safetensors", alpha=1)


RED = "\x1b[31m"


def test_names_in_files_act_on_no_terminal(tmp_path, capsys):
    dtype = {"dtype": RED, "shape": [1], "data_offsets": [0, 4]}
    (tmp_path / "a.safetensors").write_bytes(safetensors({"a": dtype}, bytes(4)))
    with told("\\x1b[31m"):
        lk.read(tmp_path / "a.safetensors")
    assert RED not in table([RED, "b"], [[RED + "a\nb", "\u202e"]])[len(RED) :].replace(RED, "", 0).split("\n", 1)[1]
    show_table(("name", "n"), [(RED + "\n", "1")])
    assert RED not in capsys.readouterr().out
    assert str(lk.LorakitError(f"a{RED}\n  - b\0")) == "a\\x1b[31m\n  - b\\x00"
    assert printable("a\nb\u202eé") == "a\\nb\\u202eé"


def test_a_warning_names_some_of_what_is_left_out(tmp_path):
    q = "lora_unet_0"
    save_file(
        {f"{q}.lora_down.weight": torch.ones(2, 6), f"{q}.lora_up.weight": torch.ones(8, 2)}
        | {f"unknown{RED}{i}": torch.ones(1) for i in range(500)},
        tmp_path / "a.safetensors",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lk.load(mlp(), tmp_path / "a.safetensors")
        except lk.LorakitError as error:
            assert len(str(error)) < 20_000 and RED not in str(error)
    assert all(len(str(each.message)) < 20_000 and RED not in str(each.message) for each in caught)


def test_values_of_gguf_of_any_size_are_not_made(tmp_path):
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    for kind in ((9, 8, 2**60), (9, 9, 4), (9, 4, 2**63)):
        (tmp_path / "a.gguf").write_bytes(start + struct.pack("<IIQ", *kind) + bytes(100))
        both(tmp_path / "a.gguf", "a.gguf")


def test_an_adapter_is_called_after_its_file_whatever_its_suffix(tmp_path):
    model = mlp()
    save_file({A: torch.ones(2, 6), B: torch.ones(5, 2)}, tmp_path / "my lora.v1.safetensors")
    lk.load(model, tmp_path / "my lora.v1.safetensors", alpha=1)
    assert list(lk.adapters(model)) == ["my_lora"]


def test_a_scale_beyond_all_numbers_is_shown_and_has_no_spectrum(adapter):  # noqa: F811
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e300}))
    value = lk.read(adapter)
    assert inspect(value).broken == ("0.weight",)
    with told("'0.weight'", "infinity"):
        lk.norm(value)


def test_a_stack_of_nothing_is_refused(tmp_path):
    np = pytest.importorskip("numpy")
    np.savez(tmp_path / "adapters.npz", **{"0.lora_a": np.ones((6, 2), "f4"), "0.lora_b": np.ones((0, 2, 5), "f4")})
    both(tmp_path, "'0'")


def test_a_zip_of_several_disks_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    content = (tmp_path / "m.bin").read_bytes()
    end = content.rindex(b"PK\5\6")
    locator = b"PK\6\7" + struct.pack("<LQL", 7, 0, 9)
    (tmp_path / "m.bin").write_bytes(content[:end] + locator + content[end:])
    with told("m.bin"):
        open_checkpoint(tmp_path / "m.bin")
    both(tmp_path / "m.bin", "m.bin")
