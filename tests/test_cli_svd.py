"""`lorakit svd`: the example, the table of a file, the picture, and every kind of bad input."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from matplotlib.image import imread
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from lorakit.algebra import Spectrum, numerical_rank, rank_for_energy
from lorakit.cli.svd import svd
from lorakit.cli.svd_plot import SUFFIXES, draw
from lorakit.errors import LorakitError

app = typer.Typer()
app.command()(svd)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def fails(message: str, *arguments: object) -> None:
    with pytest.raises(LorakitError, match=message) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cells(output: str, name: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    return re.split(r" {2,}", line)[1:]


LONG = "a.name.that.is.too.long.for.a.terminal.of.eighty.columns.but.is.never.cut.off.weight"
WEIGHTS = {
    "layers.10.up.weight": normal(0, 30, 20),
    "layers.2.up.weight": normal(1, 30, 4) @ normal(2, 4, 20),
    "half": normal(3, 16, 12).half(),
    "brain": normal(4, 16, 12).bfloat16(),
    "tiny": normal(5, 16, 12).to(torch.float8_e4m3fn),
    "double": normal(6, 5, 7).double(),
    "zero": torch.zeros(4, 6),
    "broken": torch.full((3, 3), torch.nan),
    LONG: normal(7, 2, 3),
    "norm.weight": torch.ones(8),
    "conv.weight": normal(8, 4, 3, 2),
    "ids": torch.ones(4, 4, dtype=torch.long),
    "empty": torch.ones(0, 4),
    "step": torch.tensor(1.0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    return path


def test_the_example_shows_that_two_thin_matrices_are_the_same_layer() -> None:
    before = torch.get_rng_state()
    output = run().output
    assert torch.equal(torch.get_rng_state(), before)
    for expected in ("numerical rank of W is 2", "100 numbers", "10·2 + 2·10 = 40", "U, 10×2", "B, 10×2", "A, 2×10"):
        assert expected in output
    pairs = re.findall(r"^ +(-?\d+\.\d{4}) +(-?\d+\.\d{4})$", output, re.MULTILINE)
    assert len(pairs) == 10
    assert all(float(y) == pytest.approx(float(thin), abs=2e-4) for y, thin in pairs)
    assert float(re.search(r"largest difference is (\S+)\.", output)[1]) < 1e-4
    assert max(map(len, output.splitlines())) <= 88


def test_each_weight_has_its_line_and_nothing_is_cut_off(file: Path) -> None:
    output = run(file).output
    shown = [name for name, W in WEIGHTS.items() if W.ndim == 2 and W.is_floating_point() and W.numel()]
    assert output.startswith(f"{len(shown)} weights in {file}\n")
    for name in shown:
        W = WEIGHTS[name]
        if name == "broken":
            assert cells(output, name) == ["3×3", "not finite", "–", "–", "–", "–"]
            continue
        spectrum = Spectrum.of(W)
        assert cells(output, name) == [
            f"{W.shape[0]}×{W.shape[1]}",
            str(numerical_rank(W)),
            f"{spectrum.stable_rank:.2f}",
            f"{spectrum.effective_rank:.2f}",
            str(rank_for_energy(W, 0.9)),
            str(rank_for_energy(W, 0.99)),
        ]
    assert cells(output, "layers.2.up.weight")[1] == "4"
    assert output.index("layers.2.up") < output.index("layers.10.up")
    assert not set("│┃━─…") & set(output.split("Skipped")[0]), "box drawing or a cut in plain output"
    skipped = next(line for line in output.splitlines() if line.startswith("Skipped"))
    assert skipped.startswith("Skipped 5 tensors")
    for part in (
        "1-D F32 (norm.weight)",
        "3-D F32 (conv.weight)",
        "2-D I64 (ids)",
        "empty F32 (empty)",
        "0-D F32 (step)",
    ):
        assert f"1 × {part}" in skipped


def test_tensors_of_one_kind_are_counted_together(tmp_path: Path) -> None:
    save_file({"w": normal(0, 3, 3), "a.bias": torch.ones(3), "b.bias": torch.ones(3)}, tmp_path / "m.safetensors")
    output = run(tmp_path / "m.safetensors").output
    assert output.startswith("1 weight in ")
    assert "Skipped 2 tensors, not 2-D floating-point: 2 × 1-D F32 (a.bias, …)\n" in output


def test_a_terminal_gets_a_table_and_a_bar(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        svd(file)
        out, err = capsys.readouterr()
        assert "──────" in out and "not finite" in out and "…" not in out
        assert (LONG in out) == (width == 200)  # else folded
        assert "Singular values" in err


def test_names_are_shown_as_they_are_but_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"[red]bold[/red]": normal(0, 3, 3), "line\nbreak\x1b[31m": normal(1, 3, 3)}, path)
    plain = run(path).output
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    svd(path)
    for output in (plain, capsys.readouterr().out):
        assert "[red]bold[/red] " in output
        assert r"line\nbreak\x1b[31m " in output


def bad_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 1000, b'{"a": 1}' * 10, b"\x80\x02}q\x00." * 5], ids=repr)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    fails("bad.safetensors' is no complete safetensors file", bad_file(tmp_path, content))


def test_a_truncated_file_is_refused(file: Path, tmp_path: Path) -> None:
    for length in (4, 100, file.stat().st_size - 1):
        fails("download it again", bad_file(tmp_path, file.read_bytes()[:length]))


def test_a_path_that_is_no_file_is_refused(tmp_path: Path, file: Path) -> None:
    fails("there is no file '.*absent.safetensors'", tmp_path / "absent.safetensors")
    fails("is a directory.*model.safetensors", tmp_path)
    (tmp_path / "none").mkdir()
    fails("is a directory.*holds none", tmp_path / "none")
    fails("cannot read|there is no file", tmp_path / ("x" * 300))
    fails("cannot read|there is no file", file / "below")


def test_a_file_without_weights_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"bias": torch.ones(3), "ids": torch.ones(2, 2, dtype=torch.long)}, path)
    fails(r"holds no 2-D.* 1 × 1-D F32 \(bias\), 1 × 2-D I64 \(ids\)", path)
    save_file({}, path)
    fails("holds no tensors", path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_picture_is_written_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix.upper()}"
    path.write_text("old")
    assert f"Drawn in {path}" in run("--plot", path).output
    assert path.stat().st_size > 5000
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        assert imread(path).shape == (750, 1200, 4)


def test_a_file_is_drawn_with_few_weights_and_with_many(tmp_path: Path, file: Path) -> None:
    run(file, "--plot", tmp_path / "few.png")
    many = {f"h.{i}.$w_{i}": normal(i, 40, 6) for i in range(12)} | {"_head": normal(0, 1, 3)}
    save_file(many, tmp_path / "many.safetensors")
    run(tmp_path / "many.safetensors", "--plot", tmp_path / "many.png")
    save_file({f"w{chr(97 + i)}": normal(i, 5, 5) for i in range(12)}, tmp_path / "unnumbered.safetensors")
    run(tmp_path / "unnumbered.safetensors", "--plot", tmp_path / "unnumbered.png")
    for name in ("few", "many", "unnumbered"):
        pixels = imread(tmp_path / f"{name}.png")[::3, ::3].reshape(-1, 4)
        assert len(np.unique(pixels, axis=0)) > 20


def test_a_plot_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, file: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    for target, message in {
        "out": "suffix must be one of .png",
        "out.txt": "suffix must be",
        "absent/out.png": "no directory '.*absent'",
        "dir.png": "is a directory",
    }.items():
        # The file is absent too: the plot is looked at first.
        fails(message, tmp_path / "absent.safetensors", "--plot", tmp_path / target)


def test_without_matplotlib_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(re.escape("pip install 'lorakit[plots]'"), "--plot", tmp_path / "out.png")
    assert "numerical rank" in run().output


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"zero": torch.zeros(3, 3), "nan": torch.full((3, 3), torch.nan)}, path)
    fails("zero or not finite", path, "--plot", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_failed_write_leaves_the_old_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "out.png"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LorakitError, match=r"cannot write .*No space left"):
        draw(path, "title", [("W", Spectrum.of(normal(0, 4, 4)))])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]
    assert path.read_text() == "old"


def test_matplotlib_is_loaded_by_a_plot_alone() -> None:
    code = "import sys, lorakit.cli.svd, lorakit.cli.svd_plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
