"""The examples, run as a user runs them but without a network: each proves what it says that it shows."""

import importlib.util
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PRELOADED = [
    "lorakit",
    "sklearn.datasets",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
    "accelerate",
    "trl.trainer.sft_trainer",
    "lightning",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.transformers.transformer_sd3",
]
NUMBER = r"([\d,]*\.?\d+)"


def no_network(*_):
    raise OSError("there is no network in this test")


def child(script: str, words: list[str], folder: str) -> None:
    """One example, in a process of its own."""
    for stream, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(f"{folder}/cwd")
    torch.set_num_threads(1)
    socket.socket.connect = no_network
    tempfile.tempdir, sys.argv = f"{folder}/temporary", [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()


def files_in(folder: Path) -> dict[str, int]:
    """The files below a folder, but those that Python makes, and their sizes."""
    found = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def run(folder: Path, script: str, *words: str) -> tuple[str, Path]:
    """What an example prints, and where its files are; it has written nowhere else."""
    for name in ("cwd", "temporary", "out"):
        (folder / name).mkdir()
    before = sorted(EXAMPLES.iterdir())
    # A fork server imports everything once and forks from there: seconds less for each example.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=child, args=(str(EXAMPLES / script), list(words), str(folder)))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, (folder / "errors").read_text()[-4000:]
    assert sorted(EXAMPLES.iterdir()) == before
    assert not files_in(folder / "cwd")
    assert "--out" not in words or not files_in(folder / "temporary")
    return (folder / "printed").read_text(), folder / "out"


def numbers(pattern: str, printed: str) -> list[float]:
    """The numbers at the # of a pattern that must be in what was printed."""
    found = re.search(pattern.replace("#", NUMBER), printed)
    assert found, f"{pattern!r} is not in: {printed}"
    return [float(number.replace(",", "")) for number in found.groups()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_says_what_it_shows_and_is_in_the_table(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith('"""') and 2 <= text.split('"""')[1].strip().count("\n") <= 5
    assert len(text.splitlines()) < (60 if script.name != "peft_comparison.py" else 121)
    assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_table_names_no_example_that_is_not_there():
    named = set(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.M))
    assert named == {script.name for script in SCRIPTS}


def test_plain_loop_run_as_its_readers_do(tmp_path):
    words = [sys.executable, str(EXAMPLES / "plain_loop.py")]
    own = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    before, after = numbers("loss on text held out: # before, # after", done.stdout)
    assert after < before - 1
    trained, size = numbers(r"trained: # parameters; .*python\.safetensors: # bytes", done.stdout)
    (file,) = tmp_path.glob("*/python.safetensors")
    assert 4 * trained < size == file.stat().st_size < 5 * trained
    assert sum(tensor.numel() for tensor in load_file(file).values()) == trained


def test_plain_loop_on_a_real_model(tmp_path):
    if not (SHARED / "models/stories260K").is_dir():
        pytest.skip("needs the shared models")
    model = str(SHARED / "models/stories260K")
    printed, out = run(tmp_path, "plain_loop.py", "--model", model, "--out", str(tmp_path / "out"))
    before, after = numbers("loss on text held out: # before, # after", printed)
    assert after < before - 1 and list(files_in(out)) == ["python.safetensors"]


def test_transformers_trainer(tmp_path):
    printed, out = run(tmp_path, "transformers_trainer.py", "--out", str(tmp_path / "out"))
    before, after = numbers("loss on text held out: # before, # after", printed)
    size, base = numbers("the weights of a checkpoint: # bytes; those of the base: #", printed)
    assert after < before - 1 and size < base / 5
    whole, continued = (load_file(out / run / "checkpoint-40/model.safetensors") for run in ("whole", "continued"))
    adapter = lk.read(out / "python").state_dict()
    assert len(whole) == len(adapter) and {tuple(t.shape) for t in whole.values()} == {
        t.shape for t in adapter.values()
    }
    assert list(whole) == list(continued) and all(torch.equal(whole[key], continued[key]) for key in whole)
    assert all(".lora." in key for key in whole)  # no key of the base


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
RENAMED = {
    "GPTNeoX": (SMALL, 'lk.LoRA(rank=8), "lm_head"'),  # saved as embed_out
    "Mixtral": (SMALL | {"num_key_value_heads": 4, "num_local_experts": 2}, 'lk.LoRA(rank=8), "*experts.down_proj"'),
}


@pytest.mark.parametrize("architecture", RENAMED)
def test_transformers_trainer_on_models_whose_weights_are_saved_under_other_names(architecture, tmp_path):
    sizes, what = RENAMED[architecture]
    script = (EXAMPLES / "transformers_trainer.py").read_text(encoding="utf-8").replace("Llama", architecture)
    script = re.sub(r"size = \{.*\}", f"size = {sizes}", script).replace("lk.LoRA(rank=8, dropout=0.1)", what)
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    _, out = run(tmp_path, str(tmp_path / "script.py"), "--out", str(tmp_path / "out"))
    names = {weight.name for weight in lk.read(out / "python").weights}
    keys = load_file(out / "whole/checkpoint-20/model.safetensors")
    assert {key.replace(".lora.", ".").rpartition(".python.")[0] for key in keys} == names


def test_trl(tmp_path):
    printed, out = run(tmp_path, "trl_sft.py", "--out", str(tmp_path / "out"))
    losses = [float(loss) for loss in re.search("every ten steps: (.*)", printed)[1].split()]
    assert losses[-1] < 0.2 < losses[0] and "7 is seven<end>" in printed
    assert set(files_in(out)) == {"digits/adapter_config.json", "digits/adapter_model.safetensors"}
    assert not any("lm_head" in weight.name for weight in lk.read(out / "digits").weights)


def test_accelerate(tmp_path):
    printed, out = run(tmp_path, "accelerate_loop.py", "--out", str(tmp_path / "out"))
    losses = re.findall(r"epoch (\d): loss ([\d.]+)", printed)
    assert [epoch for epoch, _ in losses] == list("123456456") and losses[3:6] == losses[6:]
    assert losses[5][1] < losses[0][1]
    size, base = numbers("the weights of a state: # bytes, the base: #", printed)
    assert size < base / 5
    state = load_file(out / "epoch-6/model.safetensors")
    assert len(state) == 4 and all(".lora." in key for key in state)


def test_lightning(tmp_path):
    printed, out = run(tmp_path, "lightning_module.py", "--out", str(tmp_path / "out"))
    losses = re.findall(r"(\d) epochs: loss ([\d.]+)", printed)
    assert [epochs for epochs, _ in losses] == list("244") and losses[1] == losses[2] and losses[1][1] < losses[0][1]
    checkpoint = torch.load(out / "2-epochs.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and all(".lora." in key for key in checkpoint["state_dict"])


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusers(tmp_path):
    printed, out = run(tmp_path, "diffusers_unet.py", "--out", str(tmp_path / "out"))
    for part in ("unet", "transformer"):
        before, after = numbers(f"{part}: loss # before, # after", printed)
        assert after < 0.9 * before
    kohya, diffusers = load_file(out / "kohya.safetensors"), load_file(out / "diffusers.safetensors")
    assert all(key.startswith("lora_unet_") for key in kohya) and any(tensor.dim() == 4 for tensor in kohya.values())
    assert all(re.match(r"transformer\..*\.lora_[AB]\.weight$", key) for key in diffusers)


def test_vision_transformer(tmp_path):
    printed, out = run(tmp_path, "vision_transformer.py", "--out", str(tmp_path / "out"))
    upright, before, after = numbers("upright digits: #% right; lying ones: #% before, #% after", printed)
    assert upright > 70 and before < 25 and after > 70
    keys = [weight.name for weight in lk.read(out / "lying.safetensors").weights]
    assert {"classifier.weight", "classifier.bias"} < set(keys)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
def test_the_comparison_with_peft_gives_equal_losses(tmp_path):
    printed, _ = run(tmp_path, "peft_comparison.py", "--seeds=2", "--steps=12", "--length=64", "--batch=2")
    found = re.findall(rf"of lorakit {NUMBER}, of PEFT {NUMBER}; adapters differ by ([\d.e+-]+)", printed)
    assert len(found) == 2 and found[0] != found[1]
    for loss, its_loss, apart in found:
        assert abs(float(loss) - float(its_loss)) < 1e-4 and float(apart) < 1e-4
    assert len(re.findall(rf"tokens/s of lorakit {NUMBER}, of PEFT {NUMBER}; step by step {NUMBER} to 1", printed)) == 2
