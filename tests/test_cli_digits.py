"""The digits experiment, run as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))


FILES = ["adapters", "base.safetensors", "report.html", "results.json"]


def lorakit(*words, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "lorakit", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        check=False,
    )


def refused(done):
    """One line on stderr, exit code 2, no traceback."""
    return done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundled")
    done = lorakit("digits", "--data", "bundled", "--out", "run", "--batches", "20", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, json.loads((folder / "run" / "results.json").read_text())


def test_results_hold_everything(bundled):
    _, _, r = bundled
    assert r["data"] == "bundled"
    assert r["parameters"]["base"] == 2_807_010
    assert r["parameters"]["lora"] == 6_794
    assert r["parameters"]["total"] == 2_813_804
    assert round(r["parameters"]["percent"], 3) == 0.242
    assert [(row["weight"], row["A"], row["B"]) for row in r["layers"]] == [
        ([1000, 784], [1, 784], [1000, 1]),
        ([2000, 1000], [1, 1000], [2000, 1]),
        ([10, 2000], [1, 2000], [10, 1]),
    ]
    assert r["digit"] == max(range(10), key=lambda d: r["base"]["wrong"][d])
    assert len(r["proofs"]) >= 6
    assert all(value is True for value in r["proofs"].values())
    assert r["disabled"] == r["base"]
    assert r["merged"] == r["adapted"]
    for key in ("base", "adapted", "rehearsed"):
        assert len(r[key]["wrong"]) == 10
        assert r[key]["accuracy"] == pytest.approx(1 - sum(r[key]["wrong"]) / r["images"]["test"])
    assert [row["strength"] for row in r["sweep"]] == pytest.approx([0.1 * i for i in range(16)])
    assert r["sweep"][0]["accuracy"] == r["base"]["accuracy"]
    assert r["sweep"][10]["accuracy"] == r["adapted"]["accuracy"]
    best = max(row["heldout_accuracy"] for row in r["sweep"])
    assert r["best_strength"]["heldout_accuracy"] == best
    assert r["switch"]["adapters"] == len(r["one_for_each"]) == 10
    assert 0 < r["switch"]["seconds_per_switch"] < r["switch"]["seconds_reload_base"]
    assert {"pretrain", "adapt", "total"} <= r["seconds"].keys()


def test_adapting_helps_the_digit(bundled):
    _, _, r = bundled
    assert r["adapted"]["wrong"][r["digit"]] < r["base"]["wrong"][r["digit"]]
    assert all(row["wrong_after"] <= row["wrong_before"] for row in r["one_for_each"])
    assert sum(r["rehearsed"]["wrong"]) < sum(r["adapted"]["wrong"])


def test_files_are_what_results_say(bundled):
    folder, _, r = bundled
    run = folder / "run"
    assert (run / "base.safetensors").stat().st_size == r["files"]["base_bytes"]
    adapter = run / "adapters" / f"digit-{r['digit']}"
    assert sum(f.stat().st_size for f in adapter.iterdir()) == r["files"]["adapter_bytes"] < 40_000
    assert sum(t.numel() for t in load_file(adapter / "adapter_model.safetensors").values()) == 6_794
    assert len(list((run / "adapters").iterdir())) == 11
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page), "the page loads something"


def test_plain_output_when_it_is_no_terminal(bundled):
    _, shown, _ = bundled
    assert "\x1b" not in shown and "┃" not in shown
    assert "1000×784" in shown and "holds" in shown


def test_same_numbers_again_and_the_base_is_reused(bundled):
    folder, _, first = bundled
    done = lorakit("digits", "--data", "bundled", "--out", "run", "--batches", "20", cwd=folder)
    assert "used again" in done.stdout
    second = json.loads((folder / "run" / "results.json").read_text())
    assert sorted(path.name for path in (folder / "run").iterdir()) == FILES
    for timed in ("seconds", "switch"):
        first.pop(timed, None), second.pop(timed)
    assert second == first


def test_fresh_trains_to_the_same_bits(bundled, tmp_path):
    folder, _, r = bundled
    args = ("--data", "bundled", "--out", "run", "--batches", "1", "--digit", "3", "--fresh")
    assert lorakit("digits", *args, cwd=tmp_path).returncode == 0
    one, two = (load_file(where / "run" / "base.safetensors") for where in (folder, tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {
        *(f"digit-{d}" for d in range(10)),
        "digit-3-rehearsed",
    }
    assert again["digit"] == 3
    assert again["base"] == r["base"]


@pytest.mark.parametrize(
    "words",
    [
        ("--digit", "10"),
        ("--digit", "x"),
        ("--batches", "0"),
        ("--rehearse", "1.5"),
        ("--rehearse", "nan"),
        ("--data", "cifar"),
        ("--data", "mnist", "--data-dir", "absent"),
        ("--out", "a-file"),
        ("--out", "a-file/below"),
        ("--seed", "-99999999999999999999999"),
    ],
)
def test_bad_options(words, tmp_path):
    (tmp_path / "a-file").write_text("")
    done = lorakit("digits", "--data", "bundled", *words, cwd=tmp_path)
    assert refused(done), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_a_damaged_base_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 nonsense")
    done = lorakit("digits", "--data", "bundled", "--out", "run", cwd=tmp_path)
    assert refused(done) and "--fresh" in done.stderr


@pytest.mark.skipif(not (SHARED / "data" / "mnist").is_dir(), reason="needs MNIST in $LORAKIT_SHARED/data/mnist")
def test_real_mnist(tmp_path):
    args = ("--data", "mnist", "--data-dir", SHARED / "data" / "mnist", "--digit", "9", "--out", "run")
    done = lorakit("digits", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    r = json.loads((tmp_path / "run" / "results.json").read_text())
    assert r["data"] == "mnist"
    assert r["images"]["test"] == 10_000
    assert r["base"]["accuracy"] >= 0.955
    assert 3 * r["adapted"]["wrong"][9] <= r["base"]["wrong"][9]
    assert r["best_strength"]["accuracy"] >= r["base"]["accuracy"] - 0.005
