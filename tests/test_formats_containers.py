"""Files that nobody should trust: archives of arrays and GGUF, whole, damaged, and made to hurt."""

import io
import json
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llamas import GROUPS, HEADS, SIZE, llama
from test_formats_gguf import gguf_file, gguf_tensors
from test_formats_litgpt import lit_files, lit_tensors
from test_formats_loralib import by_loralib, loralib
from test_formats_mlx import config_of, mlx_files, mlx_tensors
from test_formats_torchtune import tune_files, tune_tensors

import lorakit as lk
from lorakit.exchange import read
from lorakit.formats import FORMATS, read_content

FACTORS = {"fc.lora_a": np.ones((8, 2), np.float32), "fc.lora_b": np.ones((2, 8), np.float32)}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def archive(path: Path, members: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as opened:
        for name, content in members:
            if name in opened.namelist():
                with pytest.warns(UserWarning, match="Duplicate"):
                    opened.writestr(name, content)
            else:
                opened.writestr(name, content)
    return path


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["<f4", "<f2", ">f8", "<i8", "|b1", "|u1"]),
    fortran=st.booleans(),
    packed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_arrays_are_what_numpy_reads(shape, dtype, fortran, packed, tmp_path_factory):
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    (np.savez_compressed if packed else np.savez)(path, one=array, two=array)
    found = read_content(path)
    assert found.container == "npz" and list(found.tensors) == ["one", "two"]
    assert np.array_equal(found.tensors["one"].numpy(), array)


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


ARCHIVES = {
    "twice": ([("a.npy", npy(np.ones(2))), ("a.npy", npy(np.ones(2)))], "twice"),
    "up": ([("../a.npy", npy(np.ones(2)))], r"'\.\./a\.npy'"),
    "absolute": ([("/a.npy", npy(np.ones(2)))], "'/a"),
    "objects": ([("a.npy", npy(np.array([{}, None], object)))], "dtype object"),
    "texts": ([("a.npy", npy(np.array(["x"])))], "dtype"),
    "complex": ([("a.npy", npy(np.ones(2, complex)))], "dtype"),
    "shape": ([("a.npy", header((2**40, 2**40)) + bytes(8))], "asks for"),
    "negative": ([("a.npy", header((-1, 4)) + bytes(8))], "shape"),
    "longer": ([("a.npy", npy(np.ones(2)) + bytes(8))], "asks for"),
    "shorter": ([("a.npy", npy(np.ones(2))[:-1])], "asks for"),
    "no array": ([("a.npy", b"no array at all")], "no array"),
    "empty": ([("a.npy", b"")], "EOF|no array"),
    "deep": ([("a.npy", b"\x93NUMPY\x01\x00\xff\x10" + b"(" * 4351)], "no array|damaged"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_archives(case, tmp_path):
    members, words = ARCHIVES[case]
    with pytest.raises(lk.LorakitError, match=words):
        read_content(archive(tmp_path / "a.npz", members))


def test_a_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as opened, opened.open("a.npy", "w") as member:
        member.write(header((75, 2**20)))
        for _ in range(75):
            member.write(bytes(2**22))
    assert (tmp_path / "a.npz").stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(lk.LorakitError, match="bytes that unpack to"):
        read_content(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path):
    archive(tmp_path / "a.npz", [("a.npy", header((4,)) + bytes(2**20))], zipfile.ZIP_DEFLATED)
    content = (tmp_path / "a.npz").read_bytes()
    said, true = struct.pack("<I", len(header((4,))) + 16), struct.pack("<I", len(header((4,))) + 2**20)
    assert content.count(true) == 2
    (tmp_path / "b.npz").write_bytes(content.replace(true, said))
    with pytest.raises(lk.LorakitError):
        read_content(tmp_path / "b.npz")


def everything(folder: Path) -> dict[str, Path]:
    """One file of every format, by the format's name; directories where the format is one."""
    folder.mkdir(exist_ok=True)
    enabled = (True, False, True)
    bare, live = by_loralib()
    torch.save(loralib.lora_state_dict(live), folder / "loralib.pt")
    np.savez(folder / "adapters.npz", **FACTORS)
    lk.attach(bare, lk.LoRA(rank=2), ["fc"])
    lk.save(bare, folder / "native.safetensors")
    return {
        "loralib": folder / "loralib.pt",
        "mlx": mlx_files(folder / "mlx", mlx_tensors(), config_of()),
        "mlx of arrays": folder / "adapters.npz",
        "litgpt": lit_files(folder / "litgpt", lit_tensors(enabled), enabled),
        "torchtune": tune_files(folder / "tune", tune_tensors()),
        "gguf": gguf_file(folder / "a.gguf", gguf_tensors()),
        "lorakit": folder / "native.safetensors",
    }


def test_each_file_is_of_one_format(tmp_path):
    for name, path in everything(tmp_path / "all").items():
        content = read_content(path)
        assert [each.name for each in FORMATS.values() if each.recognises(content)] == [name.split()[0]]
        assert read(path).format == name.split()[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    return everything(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("name", ["loralib", "mlx", "mlx of arrays", "litgpt", "torchtune", "gguf"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_damage_is_one_error(name, whole, model, data, tmp_path):
    """Cut short, or with some bytes changed: what is read then is an adapter or an error, and what loads is finite."""
    path = read_content(whole[name]).file
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        edge = data.draw(st.sampled_from([len(content), min(len(content), 1500)]))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, edge - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / path.name).write_bytes(content)
    for more in ({}, {"alpha": 2.0, "enabled": (True, False, True), "heads": HEADS, "kv_heads": GROUPS}):
        takes = FORMATS[name.split()[0]].takes
        try:
            value = read(tmp_path / path.name, **{key: each for key, each in more.items() if key in takes})
            repr(value)
            lk.load(model, value)
        except lk.LorakitError:
            continue
        lk.detach(model)


JSON_DAMAGE = [None, [], "x", -1, 2**70, float("nan"), True, {"a": 1}]


@pytest.mark.parametrize("value", JSON_DAMAGE, ids=repr)
def test_a_damaged_config_is_an_error_or_does_not_matter(value, tmp_path, model):
    files = everything(tmp_path / "all")
    for name, file, keys in (
        ("mlx", "adapter_config.json", ("lora_parameters", "fine_tune_type", "rank", "scale", "dropout", "keys")),
        ("torchtune", "adapter_config.json", ("r", "lora_alpha", "lora_dropout", "target_modules")),
        ("litgpt", "hyperparameters.yaml", ("lora_r", "lora_alpha", "lora_dropout", "lora_query", "lora_value")),
        ("litgpt", "model_config.yaml", ("n_head", "n_query_groups", "head_size")),
    ):
        config = files[name] / file
        is_yaml = file.endswith(".yaml")
        text = config.read_text()
        lines = dict(line.split(": ") for line in text.splitlines()) if is_yaml else json.loads(text)
        for key in keys:
            inner = lines.get("lora_parameters", {}) if key in ("rank", "scale", "dropout", "keys") else lines
            inner = dict(inner) | {key: json.dumps(value) if is_yaml else value}
            changed = {**lines, "lora_parameters": inner} if inner.keys() & {"scale"} else inner
            config.write_text("\n".join(f"{k}: {v}" for k, v in changed.items()) if is_yaml else json.dumps(changed))
            try:
                lk.load(model, files[name])
            except lk.LorakitError as error:
                assert str(files[name]) in str(error) or "give alpha" in str(error), error
            else:
                lk.detach(model)
        config.write_text(text)


# GGUF


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def start(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**62
HOSTILE = {
    "tensors": start(HUGE, 0),
    "values": start(0, HUGE),
    "a text": start(0, 1) + struct.pack("<Q", HUGE),
    "a value": start(0, 1) + text("k") + struct.pack("<IQ", 8, HUGE),
    "an array": start(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, HUGE),
    "an array of texts": start(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, HUGE),
    "arrays of arrays": start(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1) * 500,
    "a type": start(0, 1) + text("k") + struct.pack("<IQ", 77, 1),
    "axes": start(1, 0) + text("x") + struct.pack("<I", 2**31) + bytes(64),
    "a shape": start(1, 0) + entry("x", (2**40, 2**40)) + bytes(64),
    "an overflowing shape": start(1, 0) + entry("x", (2**63, 2)) + bytes(64),
    "a large shape": start(1, 0) + entry("x", (2**20, 2**20)) + bytes(64),
    "an offset": start(1, 0) + entry("x", (4,), offset=2**63) + bytes(64),
    "a tensor's type": start(1, 0) + entry("x", (4,), kind=999) + bytes(64),
    "the same bytes": start(9, 0) + b"".join(entry(f"x{i}", (2**10,)) for i in range(9)) + bytes(2**12 + 64),
    "twice": start(2, 0) + entry("x", (2,)) + entry("x", (2,), offset=32) + bytes(128),
    "a key twice": start(0, 2) + 2 * (text("k") + struct.pack("<II", 4, 1)),
    "alignment": start(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
    "the alignment's type": start(0, 1) + text("general.alignment") + struct.pack("<I", 8) + text("x"),
    "a version": start(0, 0, 9),
    "another byte order": start(0, 0, 3 << 24),
    "words": start(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1),
    "blocks": start(1, 0) + entry("x", (3,), kind=8) + bytes(64),
    "nothing": b"GGUF",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_costs_nothing(case, tmp_path):
    (tmp_path / "a.gguf").write_bytes(HOSTILE[case])
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(lk.LorakitError, match=r"a\.gguf is a damaged GGUF file"):
        read_content(tmp_path / "a.gguf")
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 2**20 * 64
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.0.attn_q.weight.lora_a": np.ones((2, 8), np.float32)}, "lacks its factor B"),
        ({"blk.0.attn_q.weight.lora_a": np.ones(2, np.float32)}, "lacks its factor B"),
        ({"x.lora_a": np.ones((2, 8), np.float32), "x.lora_b": np.ones(8, np.float32)}, "no matrix"),
        ({"x.lora_a": np.ones((2, 8), np.float32), "x.lora_b": np.ones((8, 3), np.float32)}, "no two factors"),
        ({"x.lora_a": np.ones((2, 8), np.int32), "x.lora_b": np.ones((8, 2), np.float32)}, "I32 cannot"),
        ({"x.weight": np.ones((2, 8), np.float32)}, "no factor"),
        ({}, "no weight"),
    ],
)
def test_gguf_that_is_no_adapter(tensors, words, tmp_path):
    with pytest.raises(lk.LorakitError, match=words):
        read(gguf_file(tmp_path / "a.gguf", tensors))


def test_gguf_with_nan_is_not_loaded(tmp_path):
    tensors = gguf_tensors()
    tensors["blk.0.attn_q.weight.lora_b"][0, 0] = np.nan
    path = gguf_file(tmp_path / "a.gguf", tensors)
    with pytest.raises(lk.LorakitError, match="NaN"):
        lk.load(llama(), path)
    with pytest.raises(lk.LorakitError, match=r"scale|alpha"):
        read(gguf_file(tmp_path / "b.gguf", gguf_tensors(), float("nan")))


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = gguf_file(tmp_path / "a.gguf", gguf_tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    value = read(path)  # floats need no package
    with pytest.raises(lk.LorakitError, match=r"pip install 'lorakit\[formats\]'"):
        lk.load(llama(), value)


def test_layers_with_absurd_numbers_have_no_name(tmp_path):
    from lorakit.exchange import write
    from lorakit.files import adapter_value

    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"999999999": torch.nn.Linear(SIZE, SIZE)})})}
    )
    lk.attach(model, lk.LoRA(rank=2), "all-linear")
    with pytest.raises(lk.LorakitError, match="no name in GGUF"):
        write(adapter_value(model), tmp_path / "a.gguf", "gguf", arch="qwen2")
