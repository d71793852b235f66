"""Checkpoints of every form are read alike, and nothing in a file is trusted."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit import LorakitError
from lorakit.checkpoints.checkpoint import Checkpoint
from lorakit.checkpoints.opening import open_checkpoint
from lorakit.checkpoints.rewrite import rewrite
from lorakit.checkpoints.shards import DTYPES
from lorakit.checkpoints.staged import staged
from lorakit.fingerprint import fingerprint


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {f"t.{word}": (torch.rand(3, 5) * 4).to(dtype) for word, dtype in DTYPES.items() if word != "BOOL"}
    return found | {
        "bool": torch.rand(7) > 0.5,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.randint(0, 9, (3,), dtype=torch.int8),
        "z.weight": torch.randn(4, 6).bfloat16(),
    }


def shards(path: Path, content: dict[str, Tensor], count: int = 3, first: str = "model") -> Path:
    """A directory with an index, as transformers writes it."""
    path.mkdir()
    names = list(content)
    weight_map = {}
    for i in range(count):
        file = f"{first}-{i + 1:05}-of-{count:05}.safetensors"
        mine = names[i * len(names) // count : (i + 1) * len(names) // count]
        save_file({name: content[name] for name in mine}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / f"{first}.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return path


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in sorted(checkpoint)}


def in_order(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: content[name] for name in sorted(content)}


class Holder(nn.Module):
    def __init__(self, content: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in content.items():
            self.register_buffer(name.replace(".", "_"), tensor)


def forms(path: Path, content: dict[str, Tensor]) -> dict[str, Any]:
    save_file(content, path / "one.safetensors")
    torch.save(content, path / "one.pt")
    old = {name: tensor for name, tensor in content.items() if not name.startswith(NEW)}
    torch.save(old, path / "old.bin", _use_new_zipfile_serialization=False)
    several = path / "several"
    several.mkdir()
    names = list(content)
    save_file({name: content[name] for name in names[:5]}, several / "a.safetensors")
    save_file({name: content[name] for name in names[5:]}, several / "b.safetensors")
    single = path / "single"
    single.mkdir()
    save_file(content, single / "model.safetensors")
    save_file({"other": torch.zeros(1)}, single / "model.fp16.safetensors")
    torches = path / "torches"
    torches.mkdir()
    torch.save({name: content[name] for name in names[:5]}, torches / "pytorch_model-1.bin")
    torch.save({name: content[name] for name in names[5:]}, torches / "pytorch_model-2.bin")
    weight_map = {name: f"pytorch_model-{1 if i < 5 else 2}.bin" for i, name in enumerate(names)}
    (torches / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {
        "file": path / "one.safetensors",
        "pt": path / "one.pt",
        "old pt": path / "old.bin",
        "shards": shards(path / "shards", content),
        "diffusers": shards(path / "diffusers", content, first="diffusion_pytorch_model"),
        "index": path / "shards" / "model.safetensors.index.json",
        "several": several,
        "single": single,
        "torches": torches,
        "mapping": content,
    }


NEW = ("t.U16", "t.U32", "t.U64", "t.F8")
FORMS = ["file", "pt", "old pt", "shards", "diffusers", "index", "several", "single", "torches", "mapping"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_and_is_written_the_same(form, tmp_path):
    content = tensors()
    source = forms(tmp_path, content)[form]
    if form == "old pt":  # which cannot hold all dtypes
        content = {name: tensor for name, tensor in content.items() if not name.startswith(NEW)}
    checkpoint = open_checkpoint(source)
    assert_bits(read_all(checkpoint), in_order(content))
    for name in content:
        assert checkpoint.fingerprint(name) == fingerprint(content[name])
        assert b"".join(map(bytes, checkpoint.pieces(name))) == bytes(
            content[name].reshape(-1).view(torch.uint8).numpy()
        )
    left_out = rewrite(checkpoint, tmp_path / "out", {})
    assert left_out == (("model.fp16.safetensors",) if form == "single" else ())
    assert_bits(read_all(open_checkpoint(tmp_path / "out")), in_order(content))
    if isinstance(source, Path) and source.suffix != ".pt" and form not in ("old pt", "torches"):
        folder = source if source.is_dir() else source.parent
        for part in checkpoint.parts:
            assert (tmp_path / "out" / part.name).read_bytes() == (folder / part.name).read_bytes()


def test_a_module_is_its_state_dict():
    content = {"a": torch.randn(2, 3), "b": torch.arange(4)}
    assert_bits(read_all(open_checkpoint(Holder(content))), content)


def test_what_is_read_is_its_own(tmp_path):
    content = {"a": torch.randn(4), "b": torch.randn(3, 5).t()}
    torch.save(content, tmp_path / "a.pt")
    for source in (content, tmp_path / "a.pt"):
        checkpoint = open_checkpoint(source)
        for name in content:
            before = content[name].clone()
            tensor = checkpoint.read(name)
            assert tensor.is_contiguous() and torch.equal(tensor, before)
            tensor.zero_()
            assert torch.equal(checkpoint.read(name), before) and torch.equal(content[name], before)


def test_other_files_go_along_and_other_weights_do_not(tmp_path):
    base = shards(tmp_path / "base", tensors())
    (base / "tokenizer.json").write_text("[]")
    (base / "model.fp16.safetensors").write_text("")
    (base / "pytorch_model.bin").write_text("")
    (base / "original").mkdir()
    (base / ".cache").mkdir()
    left_out = rewrite(open_checkpoint(base), tmp_path / "out", {})
    assert left_out == (".cache", "model.fp16.safetensors", "original", "pytorch_model.bin")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {file.name for file in base.iterdir()} - set(left_out)


def head(header: Any, values: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + values


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "no header": b"\x01" * 7,
    "huge header": head({}, size=2**60),
    "no JSON": head(b"{x"),
    "no object": head([1]),
    "deep": head(b"[" * 100_000),
    "bad text": head(b'{"\xff": 1}'),
    "no tensor": head({}),
    "overlap": head({"a": F32, "b": F32}, b"\0" * 8),
    "gap": head({"a": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16),
    "beyond": head({"a": F32}, b"\0" * 4),
    "longer": head({"a": F32}, b"\0" * 9),
    "size": head({"a": {**F32, "shape": [3]}}, b"\0" * 8),
    "negative": head({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8),
    "minus": head({"a": {**F32, "shape": [-2]}}, b"\0" * 8),
    "bool": head({"a": {**F32, "shape": [True]}}, b"\0" * 8),
    "float": head({"a": {**F32, "shape": [2.0]}}, b"\0" * 8),
    "giant": head({"a": {**F32, "shape": [2**62, 2**62]}}, b"\0" * 8),
    "giant nothing": head({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "axes": head({"a": {**F32, "shape": [1] * 200 + [2]}}, b"\0" * 8),
    "dtype": head({"a": {**F32, "dtype": "F4"}}, b"\0" * 8),
    "dtype of no text": head({"a": {**F32, "dtype": ["F32"]}}, b"\0" * 8),
    "entry": head({"a": 3}),
    "metadata": head({"__metadata__": {"a": 1}, "a": F32}, b"\0" * 8),
    "twice": head(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"\0" * 8,
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_an_error(what, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(LorakitError, match="a" + suffix):
        open_checkpoint(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 40), torchs=st.booleans())
def test_a_changed_byte_is_an_error_or_another_value(place, value, cut, torchs, tmp_path):
    path = tmp_path / ("a.pt" if torchs else "a.safetensors")
    content = {"a": torch.ones(3, 2), "b": torch.arange(4)}
    torch.save(content, path) if torchs else save_file(content, path)
    damaged = bytearray(path.read_bytes())
    damaged[place % len(damaged)] = value
    path.write_bytes(bytes(damaged[: len(damaged) - cut]))
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            assert checkpoint.read(name).numel() <= len(damaged)
    except LorakitError:
        pass


def edited(path: Path, **change: Any) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= change
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_an_index_is_not_trusted(tmp_path):
    content = {f"w{i}": torch.randn(3) for i in range(6)}
    save_file(content, tmp_path / "x.safetensors")
    for i, file in enumerate(
        ["../x.safetensors", str(tmp_path / "x.safetensors"), "", "..", "a/b", "gone.safetensors"]
    ):
        with pytest.raises(LorakitError, match=r"not in its directory|missing"):
            open_checkpoint(edited(shards(tmp_path / f"a{i}", content), w0=file))
    with pytest.raises(LorakitError, match="'ghost'"):
        open_checkpoint(edited(shards(tmp_path / "b", content), ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(LorakitError, match="'w0' in model-00002"):
        open_checkpoint(edited(shards(tmp_path / "c", content), w0="model-00002-of-00003.safetensors"))
    path = shards(tmp_path / "d", content)
    save_file(
        {"w0": content["w0"], "w2": torch.zeros(1), "w3": torch.zeros(1)}, path / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(LorakitError, match=r"'w0' is in model-00001-of-00003.safetensors and in model-00002"):
        open_checkpoint(path)
    for i, text in enumerate(["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']):
        path = shards(tmp_path / f"e{i}", content)
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(LorakitError):
            open_checkpoint(path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "none").mkdir()
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"a": torch.ones(1).expand(2**30)}, tmp_path / "bomb.pt")
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n.")
    for source, word in {
        "gone": "does not exist",
        "none": "no \\*.safetensors",
        "nested.pt": "'state_dict' is a",
        "list.pt": "a list",
        "bomb.pt": "'a' of shape",
        "code.pt": "torch.save",
    }.items():
        with pytest.raises(LorakitError, match=word):
            open_checkpoint(tmp_path / source)
    for wrong in ({"a": 3}, {3: torch.ones(1)}, {}, {"a": torch.empty(1, device="meta")}, 5, None):
        with pytest.raises(LorakitError):
            open_checkpoint(wrong)
    with pytest.raises(LorakitError, match="adapters"):
        open_checkpoint(lk.attach(model := nn.Sequential(nn.Linear(2, 2)), lk.LoRA(1)) and model)


def test_what_is_there_is_replaced_only_if_told(tmp_path):
    one, two = shards(tmp_path / "one", {"a": torch.zeros(2)}, 1), shards(tmp_path / "two", {"a": torch.ones(2)}, 1)
    (one / "old.txt").write_text("old")
    with pytest.raises(LorakitError, match="exists already"):
        rewrite(open_checkpoint(two), one, {})
    assert torch.equal(open_checkpoint(one).read("a"), torch.zeros(2))
    rewrite(open_checkpoint(two), one, {}, force=True)
    assert torch.equal(open_checkpoint(one).read("a"), torch.ones(2)) and not (one / "old.txt").exists()
    rewrite(open_checkpoint(one), one, {"a": lambda name, value: value + 1}, force=True)  # onto itself
    assert torch.equal(open_checkpoint(one).read("a"), torch.full((2,), 2.0))
    file = tmp_path / "file.safetensors"
    for _ in range(2):
        rewrite(open_checkpoint({"a": torch.ones(2)}), file, {}, force=True)
    rewrite(open_checkpoint(two), file.with_suffix(""), {})
    with pytest.raises(LorakitError, match="name a directory"):
        rewrite(open_checkpoint(two), file, {}, force=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "file.safetensors", "one", "two"]


def test_what_fails_leaves_nothing(tmp_path):
    def fail(name: str, value: Tensor) -> Tensor:
        raise LorakitError("no")

    base = open_checkpoint(shards(tmp_path / "base", tensors()))
    with pytest.raises(LorakitError, match="no"):
        rewrite(base, tmp_path / "out", {"scalar": fail})
    with pytest.raises(LorakitError, match="own"):
        rewrite(base, tmp_path / "out", {"scalar": lambda name, value: value.double()})
    (tmp_path / "full").write_text("")
    with pytest.raises(LorakitError, match="cannot write"):
        rewrite(base, tmp_path / "full" / "out", {})
    assert sorted(os.listdir(tmp_path)) == ["base", "full"]


def test_what_a_kill_left_is_taken_away_but_not_what_is_being_written(tmp_path):
    (tmp_path / ".out.0123.partial").mkdir()
    (tmp_path / ".out.0123.partial" / "half").write_text("")
    with staged(tmp_path / "out", force=False) as beside:
        (beside / "out").mkdir()
        with staged(tmp_path / "out", force=False) as other:
            (other / "out").mkdir()
            assert beside.exists() and sorted(os.listdir(tmp_path)) == sorted([beside.name, other.name])
    assert os.listdir(tmp_path) == ["out"]


def test_progress_is_in_bytes(tmp_path):
    base, seen = open_checkpoint(tensors()), []
    rewrite(base, tmp_path / "out", {}, progress=lambda *step: seen.append(step))
    assert [name for _, _, name in seen] == [*base, ""]
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == base.bytes
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_safetensors_reads_what_is_written(tmp_path):
    content = {"b": torch.ones(3, dtype=torch.int8), "a": torch.randn(4)}
    rewrite(open_checkpoint(content), tmp_path / "x.safetensors", {})
    assert_bits(in_order(load_file(tmp_path / "x.safetensors")), in_order(content))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
