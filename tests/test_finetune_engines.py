"""`lorakit train` by two processes, over a quantized base, with trackers, and as a command from init to an answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import adapter_bytes, run, settings, write_examples
from small_lms import STORIES, needs_stories, small_lm
from typer.testing import CliRunner

import lorakit as lk
from lorakit.cli import app
from lorakit.errors import LorakitError
from lorakit.finetune.base import open_base, open_outline
from lorakit.finetune.config import dumped
from lorakit.finetune.training import estimate
from lorakit.finetune.training.methods import planned
from lorakit.finetune.training.preparation import checkpoint_gradients
from lorakit.finetune.training.record import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("model") / "llama")


def two(config: Path, *words: str) -> None:
    """The command in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "lorakit", "train", str(config), *words],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def losses(path: Path) -> list[float]:
    return [row["eval_loss"] for row in read_metrics(path / "metrics.jsonl") if "eval_loss" in row]


def test_two_processes_train_as_one_and_go_on_to_the_same_bits(model, tmp_path):
    # 36 rows to train on: both see all of them in an epoch, and every step sees eight.
    values = {"validation": 4, "steps": 9, "eval_every": 3, "save_every": 3, "learning_rate": 1e-3, "epochs": 2}
    one = run(model, tmp_path, batch_size=8, **values)
    config = tmp_path / "two.yaml"
    config.write_text(dumped(settings(model, tmp_path, batch_size=4, **values)))
    two(config, f"out={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(one.path), rel=2e-3)
    whole = (tmp_path / "two" / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("step-00000009", "step-00000006"):
        (tmp_path / "two" / "checkpoints" / name).rename(tmp_path / name)
    two(config, f"out={tmp_path / 'two'}", "resume=auto")
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    config.write_text(dumped(settings(model, tmp_path, batch_size=4, **values, resume="auto")))
    with pytest.raises(LorakitError, match="processes was 2, and is now 1"):
        run(model, tmp_path, batch_size=4, **values, resume="auto", out=str(tmp_path / "two"))


def test_sharding_that_would_not_happen_is_refused(model, tmp_path):
    with pytest.raises(LorakitError, match="fsdp"):
        run(model, tmp_path, trainer={"fsdp": True})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "loftq"])
def test_a_base_in_four_bits_trains_and_goes_on_to_the_same_bits(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    values = {"quantize": "4bit", "method": method}
    base = small_lm(tmp_path / "wide", **wide)
    outcome = run(base, tmp_path, **values)
    assert losses(outcome.path)[-1] < losses(outcome.path)[0]
    before = adapter_bytes(outcome)
    for name in ("step-00000012", "step-00000009"):
        (outcome.path / "checkpoints" / name).rename(tmp_path / name)
    assert adapter_bytes(run(base, tmp_path, **values, resume="auto")) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensorboard_is_given_the_numbers(model, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run(model, tmp_path, report_to=["tensorboard"], steps=4)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_tracker_that_is_not_installed_is_one_error(model, tmp_path):
    with pytest.raises(LorakitError, match="pip install trackio"):
        run(model, tmp_path, report_to=["trackio"])


def kept_and_told(architecture: str, layers: int, checkpointing: bool, folder: Path) -> tuple[int, int]:
    """What the forward pass of a batch keeps for the backward one, and what was told before."""
    size = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": layers}
    if architecture == "gpt2":
        size = {"n_embd": 128, "n_inner": 512, "n_layer": layers}
    place = small_lm(folder / f"{layers}", architecture, **size)
    base = open_base(place, device="cpu")
    plan = planned(base.model, settings(place, folder), "it")
    lk.attach(base.model, lk.LoRA(4))
    base.model.train()
    base.model.config.use_cache = False
    if checkpointing:
        checkpoint_gradients(base.model)
    tokens = torch.randint(5, 200, (4, 64))
    kept: dict[int, int] = {}
    frozen = {parameter.data_ptr() for parameter in base.model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.model(input_ids=tokens, labels=tokens)
    outline = open_outline(place).model
    told = estimate.estimate(
        outline, outline.config, plan, quantize=None, bytes_each=4, tokens=tokens.numel(), checkpointing=checkpointing
    )
    assert told.base == sum(p.numel() * 4 for p in outline.parameters())
    return sum(kept.values()), told.batch


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_the_estimate_of_a_batch_is_near_what_is_kept(architecture, tmp_path):
    kept, told = kept_and_told(architecture, 4, False, tmp_path)
    assert 0.5 < told / kept < 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_with_checkpointing_a_layer_more_keeps_its_input_more(architecture, tmp_path):
    few, many = (kept_and_told(architecture, layers, True, tmp_path) for layers in (2, 6))
    assert 0.5 < (many[1] - few[1]) / (many[0] - few[0]) < 2


@needs_stories
def test_from_init_to_an_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(STORIES.resolve()) if STORIES.is_absolute() else str((Path(__file__).parent.parent / STORIES).resolve())
    write_examples(tmp_path / "sums.jsonl", 60)
    command = CliRunner()

    def said(*words: str) -> str:
        result = command.invoke(app, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "lorakit train sums.yaml" in said("init", "sums.yaml", f"model={model}", "data=sums.jsonl")
    plan = said("train", "sums.yaml", "--dry-run", "device=cpu")
    assert all(word in plan for word in ("92,480 new numbers", "memory", "steps", "⟦", "sums.jsonl:1"))
    assert not (tmp_path / "runs").exists()
    told = said("train", "sums.yaml", "steps=30", "--learning-rate", "5e-3", "--device=cpu")
    assert "step 30/30" in told and "validation loss" in told and "runs/sums/adapter" in told
    answered = said("generate", "runs/sums", "one and two: ", "--json", "--max-new-tokens", "8")
    assert json.loads(answered.splitlines()[-1])["text"].strip()
    assert "perplexity" in said("eval", "runs/sums", "sums.jsonl", "--limit", "8")


def test_the_command_is_stopped_by_what_is_wrong_in_one_message(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n{"prom')
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", f"model={model}", "data=bad.jsonl", "device=cpu"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "bad.jsonl:2" in done.stderr and "bad.jsonl:3" in done.stderr
    assert not (tmp_path / "runs" / "bad" / "checkpoints").exists()
