"""A run from settings to an adapter: what it leaves behind, what it goes on from, and how it stops."""

import json
import os
import shutil
import signal
import subprocess
from typing import ClassVar

import pytest
import torch
from runs import adapter_bytes, run, settings, write_examples
from small_lms import ARCHITECTURES, small_lm

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.base import open_base
from lorakit.finetune.config import read_yaml
from lorakit.finetune.settings import METHODS
from lorakit.finetune.training import checkpoints, trainer
from lorakit.finetune.training.record import read_metrics
from lorakit.finetune.training.run import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run, to look at and to copy."""
    return run(model, tmp_path_factory.mktemp("done"), dropout=0.1, accumulation=2)


def copied(done, folder):
    """The same run elsewhere; a copy of its directory, which its settings name."""
    shutil.copytree(done.path, folder / "run")
    shutil.copy(done.path.parent / "data.jsonl", folder / "data.jsonl")
    kept = folder / "run" / "config.yaml"
    kept.write_text(kept.read_text().replace(str(done.path.parent), str(folder)))
    shutil.rmtree(folder / "run" / "adapter")
    return folder


def go_on(model, folder, step=None, **values):
    found = "auto" if step is None else str(folder / "run" / "checkpoints" / checkpoints.name_of_step(step))
    return run(model, folder, **{"resume": found, **values})


def test_a_run_leaves_what_it_promises(done):
    names = {path.name for path in done.path.iterdir()}
    assert names >= {
        "adapter", "checkpoints", "config.yaml", "env.json", "metrics.jsonl", "loss.png", "report.html", "run.json",
    }  # fmt: skip
    assert read_yaml(done.path / "config.yaml")["name"] == "it"
    assert json.loads((done.path / "env.json").read_text())["packages"]["torch"]
    rows = read_metrics(done.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    assert all(row["tokens_per_second"] > 0 for row in rows if "loss" in row)
    assert all(row["samples"][0]["text"] for row in rows if "eval_loss" in row)
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0] and done.eval_loss == min(losses)


def test_the_adapter_is_loaded_onto_the_base_and_lowers_the_loss(done, model):
    base = open_base(model, device="cpu")
    tokens = torch.tensor([base.tokenizer("one and two: 3")["input_ids"]])
    before = base.model(tokens).logits
    report = lk.load(base.model, done.adapter)
    assert report.name == "it" and not torch.equal(base.model(tokens).logits, before)
    with lk.disabled(base.model):
        assert torch.equal(base.model(tokens).logits, before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_peft_loads_the_adapter_with_equal_outputs(done, model):
    peft = pytest.importorskip("peft")
    ours, theirs = open_base(model, device="cpu"), open_base(model, device="cpu")
    tokens = torch.tensor([ours.tokenizer("one and two: 3")["input_ids"]])
    lk.load(ours.model, done.adapter)
    wrapped = peft.PeftModel.from_pretrained(theirs.model, done.adapter).eval()
    assert torch.allclose(ours.model(tokens).logits, wrapped(tokens).logits, atol=1e-5)


def test_a_checkpoint_holds_no_base(done, model):
    base = (model / "model.safetensors").stat().st_size
    held = open_base(model, device="cpu").model.state_dict()
    for path in checkpoints.checkpoints_in(done.path / "checkpoints"):
        state = torch.load(path / "optimizer.pt", weights_only=True)
        assert len(state["state"]) == 1  # the flat tensor
        files = {file.name: file.stat().st_size for file in path.rglob("*") if file.is_file()}
        assert files["adapter_model.safetensors"] < base and checkpoints.damage(path) is None
        assert sum(tensor.numel() for tensor in held.values()) > state["state"][0]["exp_avg"].numel()


@pytest.mark.parametrize("step", [3, 4, 6, 9])
def test_going_on_from_any_checkpoint_gives_the_same_bits(done, model, tmp_path, step):
    again = go_on(model, copied(done, tmp_path), step, dropout=0.1, accumulation=2)
    assert adapter_bytes(again) == adapter_bytes(done)
    last = "checkpoints/step-00000012/optimizer.pt"
    assert (again.path / last).read_bytes() == (done.path / last).read_bytes()
    timeless = [
        [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second", "memory", "tokens")}
         for row in read_metrics(path / "metrics.jsonl")]
        for path in (again.path, done.path)
    ]  # fmt: skip
    assert timeless[0] == timeless[1] or step % 2  # between two lines: the next one is of fewer steps


VARIED = {
    **{method: {"method": method} for method in METHODS if method not in ("lora", "loftq")},
    "lora+": {"lora_plus": 16.0},
    "packed": {"packing": True},
    "head": {"train_also": ["lm_head"]},
    "clipped-never": {"clip": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "checkpointed": {"gradient_checkpointing": True, "dropout": 0.1},
}


@pytest.mark.parametrize("values", VARIED.values(), ids=VARIED.keys())
def test_every_method_trains_and_goes_on_to_the_same_bits(model, tmp_path, values):
    first = run(model, tmp_path, **values)
    losses = [row["eval_loss"] for row in read_metrics(first.path / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]
    shutil.rmtree(first.path / "checkpoints" / "step-00000012")
    shutil.rmtree(first.path / "checkpoints" / "step-00000009")
    before = adapter_bytes(first)
    shutil.rmtree(first.adapter)
    assert adapter_bytes(go_on(model, tmp_path, **values)) == before


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_other_architectures_train(architecture, tmp_path):
    outcome = run(small_lm(tmp_path / "model", architecture), tmp_path)
    losses = [row["eval_loss"] for row in read_metrics(outcome.path / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_adapter_and_another_another(model, tmp_path):
    made = [adapter_bytes(run(model, tmp_path, seed=seed, overwrite=True, steps=3)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_when_to_evaluate_and_what_to_sample_changes_no_training(model, tmp_path):
    made = [
        adapter_bytes(run(model, tmp_path, overwrite=True, result="last", dropout=0.2, **values))
        for values in ({}, {"eval_every": 1, "samples": 3}, {"validation": str(tmp_path / "data.jsonl"), "data": None})
        if values.get("data", "") is not None
    ]
    assert made[0] == made[1]


def test_the_best_and_the_last_are_kept(model, tmp_path):
    outcome = run(model, tmp_path, keep_last=1, learning_rate=0.05, steps=20, eval_every=2, save_every=2)
    kept = [checkpoints.step_of(path) for path in checkpoints.checkpoints_in(outcome.path / "checkpoints")]
    losses = {
        row["step"]: row["eval_loss"] for row in read_metrics(outcome.path / "metrics.jsonl") if "eval_loss" in row
    }
    best = min(losses, key=lambda step: losses[step])
    assert kept == sorted({best, 20}) and outcome.eval_loss == losses[best]


def test_patience_stops_and_going_on_remembers_it(model, tmp_path):
    outcome = run(model, tmp_path, learning_rate=0.2, steps=60, eval_every=2, patience=2)
    assert outcome.stopped == "no better validation loss in 2 evaluations" and outcome.step < 60


def test_a_finished_run_is_finished(done, model, tmp_path):
    folder = copied(done, tmp_path)
    again = go_on(model, folder, dropout=0.1, accumulation=2)
    assert again.step == 12 and adapter_bytes(again) == adapter_bytes(done)


class TestWhatIsRefused:
    """Each is one error, and nothing was changed."""

    def test_a_run_that_is_there(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(LorakitError, match=r"resume=auto.*overwrite=true"):
            run(model, folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_other_settings(self, done, model, tmp_path):
        with pytest.raises(LorakitError, match=r"(?s)other settings.*rank: it was 4, and is now 8"):
            go_on(model, copied(done, tmp_path), rank=8, dropout=0.1, accumulation=2)

    def test_other_data(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        write_examples(folder / "data.jsonl", 41)
        with pytest.raises(LorakitError, match="data was"):
            go_on(model, folder, dropout=0.1, accumulation=2)

    def test_another_base(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        other = small_lm(tmp_path / "other", seed=1)
        kept = folder / "run" / "config.yaml"
        kept.write_text(kept.read_text().replace(str(model), str(other)))
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000012")
        with pytest.raises(LorakitError, match="base"):
            go_on(other, folder, dropout=0.1, accumulation=2)

    def test_a_base_that_changed_where_no_adapter_is(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        changed = tmp_path / "changed"
        base = open_base(model, device="cpu")
        with torch.no_grad():
            base.model.get_input_embeddings().weight.mul_(2)
        base.model.save_pretrained(changed)
        base.tokenizer.save_pretrained(changed)
        kept = folder / "run" / "config.yaml"
        kept.write_text(kept.read_text().replace(str(model), str(changed)))
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000012")
        with pytest.raises(LorakitError, match="base was"):
            go_on(changed, folder, dropout=0.1, accumulation=2)

    def test_a_damaged_checkpoint_by_name(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        file = folder / "run" / "checkpoints" / "step-00000009" / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(LorakitError, match=r"optimizer\.pt is not what was written"):
            go_on(model, folder, 9, dropout=0.1, accumulation=2)

    @pytest.mark.parametrize(
        "values, says",
        [
            ({"targets": ["q_prj"]}, "q_proj"),
            ({"device": "cuda"}, "cuda"),
            ({"device": "cpux"}, "device"),
            ({"report_to": ["wandbb"]}, "wandb"),
            ({"optimizer": "adamww"}, "adamw"),
            ({"trainer": {"fdsp": "x"}}, "did you mean fsdp"),
            ({"trainer": {"learning_rate": 1}}, "a setting of lorakit decides"),
            ({"max_length": 4096}, "context of 128"),
            ({"data": "none.jsonl"}, "none.jsonl"),
            ({"model": "none/there/at all"}, "none/there"),
            ({"method": "vera", "alpha": 3}, "alpha"),
            ({"options": {"factor": 3}}, "factor"),
            ({"validation": 100}, "leaves none to train on"),
            ({"method": "vera", "lora_plus": 4}, "lora_plus"),
            ({"optimizer": "lomo"}, "optimizer: lomo"),
            ({"trainer": {"save_total_limit": 1}}, "a setting of lorakit decides"),
            ({"trainer": {"push_to_hub": True}}, "a setting of lorakit decides"),
            ({"revision": "main"}, "revision"),
            ({"warmup": 100}, "warmup: 100 steps"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_what_cannot_be(self, model, tmp_path, values, says):
        with pytest.raises(LorakitError, match=f"(?s){says}"):
            run(values.get("model", model), tmp_path, **{key: values[key] for key in values if key != "model"})
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_damaged_newest_checkpoint_is_left_out(done, model, tmp_path):
    folder = copied(done, tmp_path)
    file = folder / "run" / "checkpoints" / "step-00000012" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert adapter_bytes(go_on(model, folder, dropout=0.1, accumulation=2)) == adapter_bytes(done)


def test_what_a_killed_process_left_is_swept_away(done, model, tmp_path):
    folder = copied(done, tmp_path)
    places = [folder / "run" / "checkpoints" / name for name in (".step-00000015.new", ".step-00000003.old")]
    for place in places:
        place.mkdir()
        (place / "optimizer.pt").write_bytes(b"half")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000012")
    with (folder / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 13, "lo')
    assert adapter_bytes(go_on(model, folder, dropout=0.1, accumulation=2)) == adapter_bytes(done)
    assert not any(place.exists() for place in places)
    assert max(row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")) == 12


def test_overwriting_takes_away_what_a_run_wrote_and_nothing_else(done, model, tmp_path):
    folder = copied(done, tmp_path)
    (folder / "run" / "mine.txt").write_text("mine")
    outcome = run(model, folder, overwrite=True, steps=3)
    assert (folder / "run" / "mine.txt").read_text() == "mine"
    assert [path.name for path in checkpoints.checkpoints_in(outcome.path / "checkpoints")] == ["step-00000003"]


class TestWhatStopsARun:
    """One message with advice, and what there is of the adapter is kept."""

    def test_a_loss_that_is_no_number(self, model, tmp_path):
        with pytest.raises(LorakitError, match=r"(?s)(loss|norm) is (nan|inf).*is kept in.*smaller learning_rate"):
            run(model, tmp_path, learning_rate=1e25, clip=0.0, schedule="constant", warmup=0)
        assert lk.load(open_base(model, device="cpu").model, tmp_path / "run" / "adapter").rows

    def test_memory(self, model, tmp_path, monkeypatch):
        step = trainer.AdapterTrainer.compute_loss

        def full(self, *arguments, **named):
            if self.state.global_step == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return step(self, *arguments, **named)

        monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", full)
        with pytest.raises(
            LorakitError, match=r"step 6\. The adapter after step 5 is kept.*batch_size=2 accumulation=2"
        ):
            run(model, tmp_path)
        assert lk.load(open_base(model, device="cpu").model, tmp_path / "run" / "adapter").rows

    def test_an_error_that_is_no_users_is_shown_as_it_is(self, model, tmp_path, monkeypatch):
        def broken(self, *arguments, **named):
            raise RuntimeError("a bug")

        monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            run(model, tmp_path)

    @pytest.mark.parametrize("limit", [300, 3_000, 20_000])
    def test_a_full_disk(self, model, tmp_path, monkeypatch, limit):
        resource = pytest.importorskip("resource")
        write = trainer.AdapterTrainer._write

        def limited(self, place):
            if self.state.global_step < 6:
                return write(self, place)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                return write(self, place)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                signal.signal(signal.SIGXFSZ, handler)

        monkeypatch.setattr(trainer.AdapterTrainer, "_write", limited)
        with pytest.raises(LorakitError, match=r"cannot write.*step-00000004 is whole"):
            run(model, tmp_path)
        monkeypatch.undo()
        whole = run(model, tmp_path, out=str(tmp_path / "other"))
        assert adapter_bytes(go_on(model, tmp_path)) == adapter_bytes(whole)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal(self, model, tmp_path, monkeypatch, number):
        step = trainer.AdapterTrainer.training_step

        def signalled(self, *arguments, **named):
            if self.state.global_step == 6:
                signal.raise_signal(number)
            return step(self, *arguments, **named)

        monkeypatch.setattr(trainer.AdapterTrainer, "training_step", signalled)
        outcome = run(model, tmp_path)
        assert outcome.stopped == f"{number.name} after step 7 of 12" and outcome.step == 7
        monkeypatch.undo()
        whole = run(model, tmp_path, out=str(tmp_path / "other"))
        assert adapter_bytes(go_on(model, tmp_path)) == adapter_bytes(whole)


@pytest.mark.skipif(os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="only root mounts a small disk")
@pytest.mark.parametrize("kilobytes", [48, 64, 88, 120, 152])
def test_a_small_disk(model, tmp_path, kilobytes):
    """Wherever in a checkpoint the disk becomes full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(LorakitError, match="cannot write"):
            run(model, tmp_path, out=str(disk / "run"), save_every=1)
        assert all(
            checkpoints.damage(path) is None for path in checkpoints.checkpoints_in(disk / "run" / "checkpoints")
        )
    finally:
        subprocess.run(["umount", disk], check=True)


class TestARunThatCouldNotBegin:
    """It takes nothing away, and is in nobody's way."""

    WRONG: ClassVar = {"optimizer": "lomo"}

    def test_the_run_before_it_stays(self, done, model, tmp_path):
        folder = copied(done, tmp_path)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        with pytest.raises(LorakitError):
            run(model, folder, overwrite=True, **self.WRONG)
        assert {
            path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
        } == before

    def test_the_next_one_begins(self, model, tmp_path):
        with pytest.raises(LorakitError):
            run(model, tmp_path, **self.WRONG)
        assert run(model, tmp_path, steps=2).step == 2


def test_a_run_of_one_step_trains(model, tmp_path):
    outcome = run(model, tmp_path, steps=1)
    tensors = lk.read(outcome.adapter).state_dict()
    assert all(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key)


def test_a_run_that_was_moved_goes_on_under_its_name(done, model, tmp_path):
    folder = copied(done, tmp_path)
    (folder / "run").rename(folder / "elsewhere")
    shutil.rmtree(folder / "elsewhere" / "checkpoints" / "step-00000012")
    again = go_on(model, folder, out=str(folder / "elsewhere"), name=None, dropout=0.1, accumulation=2)
    assert adapter_bytes(again) == adapter_bytes(done)


@pytest.mark.parametrize("values", [{"rank": 8}, {"method": "dora"}, {"dropout": 0.5}, {"targets": ["q_proj"]}])
def test_what_an_adapter_brings_is_not_asked_for_otherwise(done, model, tmp_path, values):
    with pytest.raises(LorakitError, match=f"brings its own {next(iter(values))}"):
        run(model, tmp_path, **{"rank": 16, **values}, start_from=str(done.adapter))


def test_two_processes_do_not_train_in_one_directory(model, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LorakitError, match="another process"):
            run(model, tmp_path)
    assert run(model, tmp_path, steps=2).step == 2


def test_an_adapter_is_trained_on(done, model, tmp_path):
    outcome = run(model, tmp_path, start_from=str(done.adapter), learning_rate=1e-3, rank=16)  # as it is by default
    rows = [row for row in read_metrics(outcome.path / "metrics.jsonl") if "eval_loss" in row]
    assert rows[0]["eval_loss"] < 1.1 * done.eval_loss


def test_settings_are_read_once_more_as_they_were(done, model, tmp_path):
    again = settings(model, done.path.parent, dropout=0.1, accumulation=2)
    assert read_yaml(done.path / "config.yaml") == again.model_dump()
    assert train(again.model_copy(update={"resume": "auto"})).step == 12
