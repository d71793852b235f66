"""The commands on files of adapters and checkpoints: what they print and write."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from command_files import HEADS, all_of, done, fails, made
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from values import dense

import lorakit as lk
from lorakit.errors import LorakitError, UnknownFormatError

SHARED = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
REAL = [
    pytest.param(SHARED / "adapters" / name, options, id=name)
    for name, options in {
        "peft-gptneo125m-qv": (),
        "peft-privacyfilter-tokencls": (),
        "loralib-roberta-base-mnli/roberta_base_lora_mnli.bin": ("--alpha", "16"),
        "mlx-npz-potterbot/adapters.npz": ("--alpha", "16"),
        "cloneofsimo-lora/lora_disney.safetensors": (),
    }.items()
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("files"))


def test_inspect_says_what_an_adapter_is(files):
    text = done("inspect", files / "a")
    assert f"{files / 'a'}: lorakit, 4 weights, 896 numbers (896 in float32)" in text
    assert text.count("LoRA") >= 4 and "self_attn.q_proj.weight" in text and "32×32" in text
    found = json.loads(done("inspect", files / "a", "--json"))
    wanted = lk.norm(lk.read(files / "a"))
    assert {each["name"]: pytest.approx(each["norm"]) for each in found["weights"]} == wanted


@pytest.mark.parametrize(("path", "options"), REAL)
def test_inspect_and_compare_real_adapters(path, options):
    if not path.exists():
        pytest.skip(f"no {path}")
    text = done("inspect", path, *options)
    assert "weight" in text and "state" in text
    found = json.loads(done("inspect", path, *options, "--json"))
    assert found["weights"] and all(each["norm"] is None or math.isfinite(each["norm"]) for each in found["weights"])
    if not found["missing"]:
        assert json.loads(done("compare", path, path, *options, "--json"))["same"] is True


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2/model.safetensors", "llama/model.safetensors.index.json"])
def test_inspect_shows_a_checkpoint_as_such(files, name):
    path = files / name
    folder = path if path.is_dir() else path.parent
    text = done("inspect", path)
    assert text.startswith(f"{path}: a checkpoint, ") and "it is shown as such because" in text.splitlines()[1]
    found = json.loads(done("inspect", path, "--json"))
    wanted = all_of(folder)
    assert found["kind"] == "checkpoint" and {each["name"] for each in found["tensors"]} == wanted.keys()
    for each in found["tensors"]:
        assert each["shape"] == list(wanted[each["name"]].shape)
        assert each["norm"] == pytest.approx(float(wanted[each["name"]].double().norm()), rel=1e-12)
    assert found["numbers"] == sum(value.numel() for value in wanted.values())


def test_inspect_of_a_checkpoint_names_what_is_wrong(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = {
        "bad": torch.tensor([1.0, math.nan]),
        "infinite": torch.tensor([math.inf]),
        "half": torch.full((4,), 60000.0, dtype=torch.float16),
        "large": torch.full((4,), 1e300, dtype=torch.float64),
        "tiny": torch.full((4,), 1e-300, dtype=torch.float64),
        "dead": torch.zeros(2, 3),
        "ids": torch.zeros(4, dtype=torch.int64),
        "flag": torch.tensor(True),
        "nothing": torch.zeros(0, 3),
        "step": torch.tensor(2.0),
        "eight": torch.full((4,), 2.0).to(torch.float8_e4m3fn),
        "x" * 200 + "\n[red]": torch.ones(1),
    }
    save_file(values, path)
    text = done("inspect", path)
    assert "all zero in 1 tensor: dead" in text and "NaN or infinity in 2 tensors: bad, infinite" in text
    assert "scalar" in text and "\\n[red]" in text
    found = {each["name"]: each for each in json.loads(done("inspect", path, "--json"))["tensors"]}
    norms = {name: found[name]["norm"] for name in ("half", "large", "tiny", "step", "eight", "ids", "bad", "dead")}
    assert norms == {
        "half": pytest.approx(120000),
        "large": pytest.approx(2e300),
        "tiny": pytest.approx(2e-300),
        "step": 2,
        "eight": 4,
        "ids": None,
        "bad": None,
        "dead": 0,
    }
    assert found["nothing"]["state"] == "empty" and found["ids"]["state"] == ""


def test_inspect_shows_a_checkpoint_of_torch(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    assert "a checkpoint, 2 tensors, 8 numbers" in done("inspect", tmp_path / "model.pt")


def test_what_is_neither_adapter_nor_checkpoint_says_both(tmp_path):
    (tmp_path / "empty").mkdir()
    fails("holds none of .*\n.*no checkpoint either", "inspect", tmp_path / "empty")
    (tmp_path / "text.safetensors").write_text("hello, this is no such file at all")
    fails("holds no tensors", "inspect", tmp_path / "text.safetensors")


def test_options_of_adapters_are_refused_for_a_checkpoint(files):
    fails("no adapter: leave --alpha", "inspect", files / "llama", "--alpha", "4")


def test_a_checkpoint_is_known_for_none_before_its_values_are_read(tmp_path):
    path = tmp_path / "large.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[262144,262144],"data_offsets":[0,274877906944]}}'
    with path.open("wb") as file:  # 256 GB of a hole
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 274877906944)
    with pytest.raises(UnknownFormatError, match="no adapter format that is known"):
        lk.read(path)


# compare, combine, resize


def test_compare_finds_the_same_and_the_different(files):
    assert "the same adapter" in done("compare", files / "a", files / "a")
    assert "two adapters" in done("compare", files / "a", files / "b=0.5")
    found = json.loads(done("compare", files / "a", files / "b=0.5", "--json"))
    assert not found["same"] and len(found["weights"]) == 4


def test_combine_adds_up_and_reads_weights_from_paths_with_equal_signs(files, tmp_path):
    one, two = dense(lk.read(files / "a")), dense(lk.read(files / "b=0.5"))
    for text, factor in (("b=0.5", 1.0), ("b=0.5=-2", -2.0)):
        done("combine", f"{files / 'a'}=0.25", files / text, tmp_path / f"{factor}")
        got = dense(lk.read(tmp_path / f"{factor}"))
        for name, value in got.items():
            torch.testing.assert_close(value, 0.25 * one[name] + factor * two[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_combine_by_another_method(files, tmp_path, method):
    text = done("combine", files / "a", files / "b=0.5", tmp_path / "out", "--method", method, "--rank", "2")
    assert f"written: {tmp_path / 'out'}" in text
    assert {weight.variant.rank for weight in lk.read(tmp_path / "out").weights} == {2}


def test_resize_says_its_error(files, tmp_path):
    text = done("resize", files / "a", tmp_path / "small.safetensors", "--rank", "2")
    assert "in all" in text
    one, two = dense(lk.read(files / "a")), dense(lk.read(tmp_path / "small.safetensors"))
    lost = math.hypot(*(float((one[n] - two[n]).norm()) for n in one)) / math.hypot(
        *(float(v.norm()) for v in one.values())
    )
    assert float(text.split("error ")[-1].split(" ")[0]) == pytest.approx(lost, rel=0.01)


# extract, merge, convert


def test_extract_and_merge_lead_from_the_base_to_the_tuned(files, tmp_path):
    text = done("extract", files / "llama", files / "tuned", tmp_path / "found", "--error", "0")
    assert "error in all" in text and f"written: {tmp_path / 'found'}" in text
    text = done("merge", files / "llama", tmp_path / "found", tmp_path / "merged")
    assert "lost" in text
    got, wanted = all_of(tmp_path / "merged"), all_of(files / "tuned")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    LlamaForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("to", ["peft", "lorakit", "mlx", "gguf", "torchtune", "litgpt"])
def test_convert_keeps_every_update(files, tmp_path, to):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    heads = HEADS if to == "gguf" else HEADS[:4] if to == "torchtune" else ()
    done("convert", files / "a", out, "--to", to, *heads)
    if to in ("gguf", "torchtune", "litgpt"):
        back = tmp_path / "back"
        done("convert", out, back, "--to", "peft", "--names", files / "llama", *(HEADS[:4] if heads else ()))
        out = back
    assert json.loads(done("compare", files / "a", out, "--json"))["distance"] < 1e-6


def test_an_option_that_neither_source_nor_target_needs_is_refused(files, tmp_path):
    fails("needs --heads", "convert", files / "a", tmp_path / "out", "--to", "peft", "--heads", "4")
    fails("needs no arch", "convert", files / "a", tmp_path / "out", "--to", "kohya", "--arch", "llama")
    fails("needs no part", "merge", files / "llama", files / "a", tmp_path / "out", "--part", "unet")
    with pytest.raises(LorakitError, match="writing peft needs no heads"):
        lk.write(lk.read(files / "a"), tmp_path / "out", "peft", heads=4)
    assert not list(tmp_path.iterdir())
