"""The commands and the world: outputs that are whole or absent, wrong input, terminals, and the help."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_files import done, fails, made, outside, picture, started
from helpers import randomize
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.cli import main as lorakit_main
from lorakit.errors import LorakitError
from lorakit.formats import FORMATS
from lorakit.variants import LoRA


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("files"))


def commands(files: Path, out: Path) -> dict[str, tuple[object, ...]]:
    return {
        "combine": ("combine", files / "a", out),
        "resize": ("resize", files / "a", out, "--rank", "2"),
        "extract": ("extract", files / "llama", files / "tuned", out, "--rank", "2"),
        "merge": ("merge", files / "llama", files / "a", out),
        "convert": ("convert", files / "a", out, "--to", "peft"),
    }


@pytest.mark.parametrize("command", ["combine", "resize", "extract", "merge", "convert"])
def test_nothing_is_replaced_unasked_and_all_of_it_when_asked(files, tmp_path, command):
    out = tmp_path / "out"
    arguments = commands(files, out)[command]
    done(*arguments)
    first = picture(out)
    (out / "mine.txt").write_text("kept")
    fails("--force", *arguments)
    assert (out / "mine.txt").read_text() == "kept"
    done(*arguments, "--force")
    assert picture(out) == first if command == "merge" else picture(out).items() >= first.items()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["combine", "resize", "extract", "merge", "convert"])
def test_a_directory_that_cannot_be_written_is_one_message(files, tmp_path, command):
    (tmp_path / "file").write_text("no directory")
    fails("cannot write", *commands(files, tmp_path / "file" / "out")[command])
    fails("cannot write", *commands(files, Path("/proc/nowhere/out"))[command])


@pytest.mark.parametrize("command", ["combine", "resize", "extract", "merge", "convert"])
def test_a_full_disk_leaves_nothing(files, tmp_path, command):
    def small() -> None:  # a write beyond so many bytes of a file fails, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code, _, err = outside(*commands(files, tmp_path / "out")[command], preexec_fn=small)
    assert code == 2 and "cannot write" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """A checkpoint, the same tuned, and an adapter of it, that take a while."""
    folder = tmp_path_factory.mktemp("heavy")
    torch.manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(768, 768) for i in range(40)}
    tuned = {name: value + 0.1 * torch.randn(768, 768) for name, value in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(40))
    lk.attach(model, LoRA(rank=64), name="a")
    randomize(model, "a")
    lk.save(model, folder / "a", name="a")
    return folder


@pytest.mark.parametrize("command", ["merge", "extract", "convert"])
def test_a_killed_command_leaves_nothing_and_the_next_one_cleans_up(heavy, tmp_path, command):
    out = tmp_path / "out"
    arguments = {
        "merge": ("merge", heavy / "base.safetensors", heavy / "a", out, "--no-verify"),
        "extract": ("extract", heavy / "base.safetensors", heavy / "tuned.safetensors", out, "--rank", "64"),
        "convert": ("convert", heavy / "a", out, "--to", "peft"),
    }[command]
    process = started(*arguments)
    until = time.monotonic() + 60
    while process.poll() is None and not list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    left = [each.name for each in tmp_path.iterdir()]
    assert left and process.returncode == -signal.SIGKILL and "out" not in left
    done(*arguments)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_replaced_as_a_whole(files, tmp_path):
    out = tmp_path / "out"
    done("convert", files / "a", out, "--to", "mlx")
    done("convert", files / "a", out, "--to", "peft", "--force")
    assert lk.read(out).format == "peft"  # nothing of the other format beside it
    assert sorted(each.name for each in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("command", ["combine", "resize", "extract", "merge", "convert"])
def test_only_adapters_and_checkpoints_are_replaced(files, tmp_path, command, monkeypatch):
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "letters" / "dear.txt").write_text("dear")
    fails("holds directories, 'letters'", *commands(files, home)[command], "--force")
    fails("holds no adapter and no checkpoint", *commands(files, home / "letters")[command], "--force")
    monkeypatch.chdir(home)
    fails("the directory you are in", *commands(files, Path("../home"))[command], "--force")
    assert picture(home) == {"letters/dear.txt": b"dear"}


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["unasked", "force"])
@pytest.mark.parametrize("command", ["combine", "resize", "extract", "merge", "convert"])
def test_no_output_is_an_input_nor_holds_one(files, tmp_path, command, force):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(files), str(copy)], check=True)
    before = picture(copy)
    source = copy / ("llama" if command in ("extract", "merge") else "a")
    for out in (source, source / "inside", copy):
        fails(".", *commands(copy, out)[command], *force)
    fails("lies in the input", *commands(copy, source / "inside")[command], *force)
    link = tmp_path / "link"
    link.symlink_to(source)
    fails("there already" if not force else "is an input too", *commands(copy, link)[command], *force)
    assert picture(copy) == before


def test_the_library_never_puts_a_merge_in_the_place_of_what_holds_its_base(files, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(files), str(copy)], check=True)
    before = picture(copy)
    for base in (copy / "gpt2", copy / "gpt2" / "model.safetensors", copy / "llama"):
        with pytest.raises(LorakitError):
            lk.merge_checkpoint(base, lk.read(files / "a"), copy, force=True)
    with pytest.raises(LorakitError, match="take the place of"):
        lk.merge_checkpoint(copy / "llama", lk.read(files / "a"), copy, force=True)
    assert picture(copy) == before


# what is wrong is one message and exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "a", "--energy", "0"], "--energy 0"),
        (["inspect", "a", "--energy", "nan"], "--energy nan"),
        (["inspect", "a", "--from", "kohlrabi"], "'kohlrabi' is not known"),
        (["inspect", "a", "--alpha", "4"], "needs no alpha"),
        (["inspect", "a", "--plot", "picture.doc"], "picture.doc"),
        (["inspect", "a", "--enabled", "1,2"], "zeros and ones"),
        (["compare", "a", "nowhere"], "nowhere does not exist"),
        (["compare", "a", "llama"], "holds none of"),
        (["combine", "out"], "an adapter and an output"),
        (["combine", "a=nan", "out"], "'nan' is no finite number"),
        (["combine", "a=inf", "a", "out"], "'inf' is no finite number"),
        (["combine", "a=half", "out"], "'half' is no finite number"),
        (["combine", "=1", "out"], "is no finite number"),
        (["combine", "nowhere=0.5", "out"], "nowhere does not exist"),
        (["combine", "a", "out", "--to", "kohlrabi"], "'kohlrabi' is not known"),
        (["combine", "a", "out", "--rank", "0"], "rank=0"),
        (["combine", "a", "out", "--method", "ties"], "rank=, energy= or error="),
        (["combine", "a", "out", "--method", "ties", "--rank", "2", "--density", "0"], "density=0"),
        (["combine", "a", "out", "--method", "dare", "--rank", "2", "--density", "nan"], "density=nan"),
        (["resize", "a", "out"], "--rank, --energy or --error"),
        (["resize", "a", "out", "--rank", "0"], "rank=0"),
        (["resize", "a", "out", "--rank", "-3"], "rank=-3"),
        (["resize", "a", "out", "--energy", "1.5"], "energy=1.5"),
        (["resize", "a", "out", "--error", "nan"], "error=nan"),
        (["extract", "llama", "tuned", "out"], "--rank, --energy or --error"),
        (["extract", "llama", "tuned", "out", "--rank", "0"], "rank=0"),
        (["extract", "llama", "llama", "out", "--rank", "1"], "nothing changed"),
        (["extract", "llama", "gpt2", "out", "--rank", "1"], "nothing changed"),
        (["extract", "llama", "nowhere", "out", "--rank", "1"], "nowhere does not exist"),
        (["extract", "llama", "a", "out", "--rank", "1"], "no *.safetensors"),
        (["merge", "llama", "nowhere", "out"], "nowhere does not exist"),
        (["merge", "gpt2", "a", "out"], "lacks 4 of its 4 weights"),
        (["merge", "tuned", "a", "out"], "other values than the base"),
        (["merge", "llama", "a", "out", "--strength", "nan"], "scale=nan"),
        (["merge", "llama", "a", "out", "--least-survival", "2"], "least_survival=2"),
        (["merge", "llama", "a", "out.safetensors"], "name a directory"),
        (["merge", "llama", "a", "out", "--heads", "0"], "heads=0"),
        (["convert", "a", "out", "--to", "kohlrabi"], "'kohlrabi' is not known"),
        (["convert", "a", "out.gguf", "--to", "gguf"], "arch="),
        (["convert", "a", "out.gguf", "--to", "gguf", "--arch", "llama"], "heads="),
        (["convert", "a", "out", "--to", "xlabs"], "read, not written"),
        (["convert", "a", ".", "--to", "peft"], "there already"),
        (["convert", "a", "", "--to", "peft"], "there already"),
        (["convert", "a", "out", "--to", "peft", "--names", "nowhere"], "nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message(files, tmp_path, monkeypatch, capsys, arguments, message):
    for name in ("a", "b=0.5", "llama", "gpt2", "tuned"):
        (tmp_path / name).symlink_to(files / name)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        lorakit_main()
    found = capsys.readouterr()
    assert stopped.value.code == 2 and found.out == ""
    assert found.err.startswith("lorakit: ") and message in found.err and "Traceback" not in found.err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_shell_sees_exit_codes(files, tmp_path):
    code, out, err = outside("convert", files / "a", tmp_path / "out")
    assert code == 2 and "--to" in err and out == ""
    code, out, err = outside("merge", files / "llama")
    assert code == 2 and "Missing argument" in err
    code, out, err = outside("inspect", tmp_path / "nowhere")
    assert code == 2 and err.count("\n") == 1 and out == ""
    code, out, err = outside("inspect", files / "a", "--json")
    assert code == 0 and json.loads(out) and err == ""


def test_a_reader_that_leaves_early_is_no_traceback(files):
    with started("inspect", files / "llama") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err and "Exception ignored" not in err


# terminals


def test_bars_show_on_terminals_alone(heavy, tmp_path):
    arguments = ("extract", heavy / "base.safetensors", heavy / "tuned.safetensors", tmp_path / "out", "--rank", "64")
    code, out, err = outside(*arguments)
    assert code == 0 and err == "" and "\x1b" not in out
    screen, end = pty.openpty()
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), "--force"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env={**os.environ, "TERM": "xterm"})
    os.close(end)
    shown = b""
    with pytest.raises(OSError, match="Input/output"):  # the other end is closed
        while True:
            shown += os.read(screen, 4096)
    assert process.wait() == 0 and b"Extracting" in shown and b"\x1b" not in process.stdout.read()
    process.stdout.close()
    os.close(screen)


@pytest.mark.parametrize(
    "command", ["inspect", "compare", "combine", "resize", "extract", "merge", "convert", "svd", "digits"]
)
def test_help_names_every_argument(command):
    text = done(command, "--help")
    assert "Usage: " in text and "--help" in text


def test_help_says_which_formats_there_are():
    for command in ("convert", "combine", "resize", "extract"):
        text = " ".join(done(command, "--help", env={"COLUMNS": "400"}).split())
        assert all(f" {name}" in text for name, form in FORMATS.items() if form.write is not None)
