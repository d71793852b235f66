"""The commands on files of adapters and checkpoints: what they print and write, and what they refuse."""

import json
import math
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
from helpers import randomize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result
from values import dense

import lorakit as lk
from lorakit.cli import app
from lorakit.cli import main as lorakit_main
from lorakit.errors import LorakitError, UnknownFormatError
from lorakit.formats import FORMATS
from lorakit.variants import LoRA

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
HEADS = ("--heads", "4", "--kv-heads", "2", "--arch", "llama")


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments: object, env: dict[str, str] | None = None) -> str:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(message: str, *arguments: object) -> None:
    with pytest.raises(LorakitError, match=message):
        run(*arguments)


def started(*arguments: object, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def outside(*arguments: object, **how) -> tuple[int, str, str]:
    process = started(*arguments, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A sharded Llama, a GPT-2 of one file, the Llama tuned, and two adapters of the Llama."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "llama", max_shard_size="40KB")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    for seed, name in enumerate(("a", "b=0.5")):
        lk.attach(model, LoRA(rank=4 + seed), targets=["q_proj", "v_proj"], name="mine")
        randomize(model, "mine", seed=seed + 1)
        lk.save(model, folder / name, name="mine")
        lk.detach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned", max_shard_size="40KB")
    return folder


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def picture(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


# inspect


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


# outputs


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
