"""Files that were made to do harm: an error that names the file, soon, in little memory, and no code is run."""

import json
import pickle
import resource
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import attached, refused
from models import mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.header import Header, WeightEntry
from lorakit.safe import in_order
from lorakit.values.adapter import Adapter
from lorakit.values.inspection import inspect
from lorakit.values.weight import AdapterWeight


@pytest.fixture
def adapter(tmp_path):
    """A directory of ours without our header, as PEFT writes it."""
    lk.save(attached(mlp(), targets=["0"]), tmp_path / "a")
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(tensors), tensors, metadata={"format": "pt"})
    return tmp_path / "a"


@contextmanager
def told(*words, seconds=5.0, mebibytes=300):
    """A LorakitError with these words, within this time and memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(lk.LorakitError) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert len(str(caught.value)) < 20_000
    assert time.monotonic() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024


def both(path, *words):
    """Neither `read` nor `load` takes it."""
    with told(*words):
        lk.read(path)
    with refused(mlp(), *words):
        lk.load(mlp(), path)


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


CONTENTS = {
    "empty": b"",
    "short": b"\1\2\3",
    "absurd header size": struct.pack("<Q", 2**63) + b"{}",
    "header of 4 GB": struct.pack("<Q", 2**32) + b"{}",
    "no JSON": safetensors(b"{nonsense"),
    "no object": safetensors(b"[1, 2, 3]"),
    "deep": safetensors(b"[" * 200_000),
    "deep object": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no text": safetensors(b"\xff\xfe{}"),
    "overlap": safetensors({A: entry([2, 6], 0, 48), B: entry([8, 2], 40, 104)}, bytes(104)),
    "hole": safetensors({A: entry([2, 6], 0, 48), B: entry([8, 2], 60, 124)}, bytes(124)),
    "beyond the end": safetensors({A: entry([2, 6], 0, 48), B: entry([8, 2], 48, 112)}, bytes(60)),
    "more than it says": safetensors({A: entry([2, 6], 0, 48)}, bytes(100)),
    "huge shape": safetensors({A: entry([2**40, 2**40], 0, 48)}, bytes(48)),
    "shape that wraps": safetensors({A: entry([2**32, 2**32, 12], 0, 48)}, bytes(48)),
    "negative": safetensors({A: entry([-2, -6], 0, 48)}, bytes(48)),
    "backwards": safetensors({A: entry([2, 6], 48, 0)}, bytes(48)),
    "no shape": safetensors({A: {"dtype": "F32", "data_offsets": [0, 48]}}, bytes(48)),
    "strange dtype": safetensors({A: entry([2, 6], 0, 48, "F99")}, bytes(48)),
    "true for 1": safetensors({A: entry([True, 12], 0, 48)}, bytes(48)),
    "size of another dtype": safetensors({A: entry([2, 6], 0, 48, "F16")}, bytes(48)),
    "twice one name": safetensors(
        f'{{"{A}":{json.dumps(entry([2, 6], 0, 48))},"{A}":{json.dumps(entry([2, 6], 48, 96))}}}'.encode(), bytes(96)
    ),
    "metadata of numbers": safetensors({"__metadata__": {"format": 1}, A: entry([2, 6], 0, 48)}, bytes(48)),
    "nothing in it": safetensors({}),
    "nul bytes": bytes(4096),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_tensors_that_are_no_safetensors_file(what, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(CONTENTS[what])
    both(adapter, str(adapter))
    single = adapter.with_suffix(".safetensors")
    single.write_bytes(CONTENTS[what])
    both(single, single.name)


CONFIGS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "no text": b"\xff\xff",
    "deep": b'{"a":' * 100_000,
    "long number": b'{"r":' + b"9" * 100_000 + b"}",
    "no rank": {"r": None},
    "rank 0": {"r": 0},
    "negative rank": {"r": -1},
    "absurd rank": {"r": 10**18},
    "rank of text": {"r": "2"},
    "rank of a list": {"r": [2]},
    "another rank": {"r": 3},
    "true rank": {"r": True},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "negative alpha": {"lora_alpha": -1},
    "alpha 0": {"lora_alpha": 0},
    "alpha of text": {"lora_alpha": "16"},
    "no alpha": {"lora_alpha": None},
    "dropout 2": {"lora_dropout": 2},
    "no type": {"peft_type": None},
    "type of a list": {"peft_type": ["LORA"]},
    "another method": {"peft_type": "IA3"},
    "patterns of a list": {"rank_pattern": ["0"]},
    "pattern of no rank": {"rank_pattern": {"0": "x"}},
    "exponential pattern": {"rank_pattern": {"(.*)*x": 3}},
    "no pattern": {"alpha_pattern": {"(": 3}},
    "bias of another kind": {"bias": 7},
    "rows of text": {"trainable_token_indices": "abc"},
    "modules of a number": {"modules_to_save": 5},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_that_make_no_sense(what, adapter):
    path, change = adapter / "adapter_config.json", CONFIGS[what]
    path.write_bytes(
        change if isinstance(change, bytes) else json.dumps({**json.loads(path.read_text()), **change}).encode()
    )
    both(adapter, str(adapter))


def test_a_config_of_gigabytes_is_not_read(adapter):
    with (adapter / "adapter_config.json").open("wb") as file:
        file.truncate(2**33)  # sparse
    both(adapter, "adapter_config.json")


TENSORS = {
    "scalar": (torch.tensor(1.0), torch.zeros(5, 2)),
    "vector": (torch.zeros(6), torch.zeros(5, 2)),
    "empty": (torch.zeros(0, 6), torch.zeros(5, 0)),
    "no columns": (torch.zeros(2, 0), torch.zeros(5, 2)),
    "integers": (torch.zeros(2, 6, dtype=torch.long), torch.zeros(8, 2, dtype=torch.long)),
    "booleans": (torch.zeros(2, 6, dtype=torch.bool), torch.zeros(5, 2)),
    "eight bits": (torch.zeros(2, 6).to(torch.float8_e4m3fn), torch.zeros(5, 2)),
    "complex": (torch.zeros(2, 6, dtype=torch.complex64), torch.zeros(5, 2)),
    "one factor": (torch.zeros(2, 6), None),
    "the other factor": (None, torch.zeros(5, 2)),
    "other ranks": (torch.zeros(2, 6), torch.zeros(5, 3)),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_no_two_factors(what, adapter):
    pair = {key: tensor for key, tensor in zip((A, B), TENSORS[what], strict=True) if tensor is not None}
    save_file(pair, adapter / "adapter_model.safetensors")
    both(adapter, str(adapter), "0")


def test_all_nan_is_refused_by_load_and_shown_by_inspect(adapter):
    save_file({A: torch.full((2, 6), torch.nan), B: torch.zeros(5, 2)}, adapter / "adapter_model.safetensors")
    with refused(mlp(), A, "NaN"):
        lk.load(mlp(), adapter)
    assert inspect(lk.read(adapter)).broken == ("0.weight",)


def test_all_zero_is_loaded_and_called_dead(adapter):
    save_file({A: torch.zeros(2, 6), B: torch.zeros(5, 2)}, adapter / "adapter_model.safetensors")
    lk.load(mlp(), adapter)
    assert inspect(lk.read(adapter)).dead == ("0.weight",)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_pickle_is_executed(form, tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "adapter.bin"
    content = {"0.lora_A": torch.zeros(2, 6), "x": Evil(touched)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    both(path, "adapter.bin")
    assert not touched.exists()


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    path = tmp_path / "adapter.bin"
    torch.save({"0.lora_A": torch.zeros(1, 1).expand(2**20, 2**20), "0.lora_B": torch.zeros(8, 2**20)}, path)
    both(path, "adapter.bin")


def test_archives_that_grow_are_refused(tmp_path):
    path = tmp_path / "adapter.bin"
    torch.save({"0.lora_A": torch.zeros(2, 6)}, tmp_path / "small.bin")
    with zipfile.ZipFile(tmp_path / "small.bin") as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as grown:
        for name in small.namelist():
            grown.writestr(name, small.read(name) if "/data/" not in name else bytes(2**27))
    both(path, "adapter.bin")


@pytest.mark.parametrize(
    "content", [b"PK\3\4", b"PK\3\4" + bytes(100), b"\x80\2.", b"\x80\2}q\0.", b"\x80", b"GGUF", b"GGUF" + b"\xff" * 60]
)
@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.npz", "a.gguf", "a.safetensors"])
def test_beginnings_of_other_files(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    both(tmp_path / name, name)


def test_what_is_no_file(tmp_path):
    both(tmp_path, str(tmp_path))
    both(tmp_path / "nowhere", "does not exist")
    (tmp_path / "adapter_model.safetensors").mkdir()
    both(tmp_path, str(tmp_path))
    both(Path("/dev/null"), "/dev/null")


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "é": "ü\n", "b": "{}"}])
def test_what_is_written_is_what_the_library_reads(metadata, tmp_path):
    tensors = {
        "b": torch.randn(3, 2),
        "a": torch.randn(5).double(),
        "ünïcode": torch.randn(2, 2, 2).half(),
        "c": torch.randn(3).bfloat16(),
        "t": torch.randn(4, 3).t(),
        "scalar": torch.tensor(2.5),
    }
    content = in_order(tensors, metadata)
    assert content == in_order(dict(reversed(tensors.items())), dict(reversed((metadata or {}).items())))
    (tmp_path / "x.safetensors").write_bytes(content)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
        assert set(opened.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(key), tensor) and opened.get_tensor(key).dtype == tensor.dtype


def test_a_message_steers_no_terminal_and_ends():
    assert str(lk.LorakitError("a\x1b[31m\r\0\u202eb\nc é")) == "a\\x1b[31m\\r\\x00\\u202eb\nc é"
    assert len(str(lk.LorakitError("x" * 10**6))) < 20_000


def test_without_a_config_whole_modules_are_read_too(adapter):
    """And what cannot be computed is not: stacks of two sizes, a product beyond any number."""
    (adapter / "adapter_config.json").unlink()
    score = {"base_model.model.score.weight": torch.randn(3, 5)}
    save_file({A: torch.randn(2, 6), B: torch.randn(5, 2), **score}, adapter / "adapter_model.safetensors")
    found = lk.read(adapter, alpha=4)
    assert [weight.name for weight in found.weights] == ["0.weight", "score.weight"]
    entry = WeightEntry("w", "stack", None, None, None, None, kind="Parameter")
    stack = {"A": torch.randn(2, 1, 4), "B": torch.randn(3, 3, 1)}
    header = Header("x", lk.LoRA(1), (entry,))
    keys = {f"base_model.model.w.stack.lora_{name}.weight": tensor for name, tensor in stack.items()}
    with told("two sizes"):
        Adapter.of(header, keys, "here")
    huge = AdapterWeight(
        entry._replace(kind=None), lk.LoRA(1, alpha=1e300), {"A": torch.ones(1, 4), "B": torch.ones(3, 1)}
    )
    assert inspect(Adapter("x", huge.variant, (huge,))).broken == ("w.stack",)
