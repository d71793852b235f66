"""Reading digits: what is whole is read bit for bit, what is not is one LorakitError. No test uses the network."""

import gzip
import hashlib
import io
import os
import re
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorakit.digits import data
from lorakit.digits.idx import read_idx
from lorakit.errors import LorakitError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "mnist"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_mnist(directory: Path, n: int = 240, pack=gzip.compress, suffix: str = ".gz") -> dict[str, bytes]:
    """Four files of MNIST's names and format: noise, labelled 0, 1, ..., 9, 0, 1, ..."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    written = {}
    for prefix, count in (("train", n), ("t10k", n // 6)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        written[f"{prefix}-images-idx3-ubyte{suffix}"] = pack(idx(images))
        written[f"{prefix}-labels-idx1-ubyte{suffix}"] = pack(idx(labels))
    for name, content in written.items():
        (directory / name).write_bytes(content)
    return written


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_below(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def no_network(*_, **__):
    raise requests.exceptions.ConnectionError("no route") from OSError(101, "Network is unreachable")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "get", no_network)
    return tmp_path / "cache" / "mnist"


@pytest.fixture
def served(monkeypatch, tmp_path) -> dict[str, bytes]:
    """What the mirrors send, the first of them no images; empty or spoil it to see them fail."""
    files = small_mnist(tmp_path / "server")
    monkeypatch.setattr(data, "_MNIST", {name: sha256(files[name]) for name in data._MNIST})

    def get(url, **_):
        name = url.rsplit("/", 1)[1]
        answer = requests.Response()
        answer.status_code = 404 if name not in files or ("amazonaws" in url and "images" in name) else 200
        answer.raw = io.BytesIO(files.get(name, b""))
        return answer

    monkeypatch.setattr(requests, "get", get)
    return files


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("idx") / "file"


arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
headers = st.builds(
    lambda code, sizes, rest: bytes([0, 0, code, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + rest,
    st.sampled_from([8, 8, 8, 9, 13]),
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=12),
    st.binary(max_size=30),
)


@settings(deadline=None)
@given(arrays, st.sampled_from([bytes, gzip.compress]), st.data())
def test_what_is_written_is_read_and_no_part_of_it_is(file, array, pack, draw):
    whole = pack(idx(array))
    file.write_bytes(whole)
    read = read_idx(file)
    assert (read.dtype, read.shape) == (torch.uint8, array.shape)
    assert np.array_equal(read.numpy(), array)
    file.write_bytes(whole[: draw.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(LorakitError, match="file"):
        read_idx(file)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), headers), st.sampled_from([bytes, gzip.compress, lambda b: b"\x1f\x8b" + b]))
def test_any_bytes_are_an_array_or_an_error(file, content, pack):
    file.write_bytes(pack(content))
    try:
        assert read_idx(file).dtype == torch.uint8
    except LorakitError as error:
        assert str(file) in str(error)


BAD = {
    "empty": (b"", "is empty"),
    "empty, compressed": (gzip.compress(b""), "is empty"),
    "float32": (bytes([0, 0, 13, 1, 0, 0, 0, 1]) + bytes(4), "00 00 0d 01"),
    "a web page": (b"<!DOCTYPE html>", "unsigned bytes"),
    "trailing garbage": (idx(np.zeros(3, np.uint8)) + b"x", "more than the 3 bytes"),
    "another checksum": (gzip.compress(idx(np.zeros(3, np.uint8)))[:-8] + bytes(8), "CRC"),
    "garbage after gzip": (gzip.compress(idx(np.zeros(3, np.uint8))) + b"x", "gzip"),
    "absurd sizes": (bytes([0, 0, 8, 3]) + b"\xff" * 8 + bytes(4), "at most"),
    "absurd dimensions": (bytes([0, 0, 8, 200]) + bytes(800), "200 dimensions"),
}


@pytest.mark.parametrize("content, says", BAD.values(), ids=BAD)
def test_errors_say_what_is_wrong_and_what_to_do(file, content, says):
    file.write_bytes(content)
    with pytest.raises(LorakitError, match=f"file.*{says}.*delete it and run again"):
        read_idx(file)


def test_what_is_no_file_is_an_error(tmp_path):
    for path, says in ((tmp_path, "directory"), (tmp_path / "none", "no such file"), ("a\0b", "no such file")):
        with pytest.raises(LorakitError, match=says):
            read_idx(path)


def test_a_bomb_is_read_only_as_far_as_its_header_says(file, monkeypatch):
    file.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8)) + bytes(10_000_000)))
    read, original = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: read.append(n) or original(self, n))
    with pytest.raises(LorakitError, match="more than the 5 bytes"):
        read_idx(file)
    assert read == [4, 4, 6]  # magic, one size, and one byte more than it says


def check(dataset: data.Dataset) -> list[int]:
    """What holds for all data; how many digits there are to train on, held out, and to test."""
    splits = (dataset.train, dataset.heldout, dataset.test)
    for split in splits:
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.shape == (len(split), 784)
        assert split.labels.unique().tolist() == list(range(10))
        low, high = (float(end) * 0.3081 + 0.1307 for end in split.images.aminmax())
        assert -1e-6 < low < high < 1 + 1e-6
    return [len(split) for split in splits]


def test_bundled_digits_are_split_without_overlap_and_always_alike():
    dataset = data.load("bundled")
    sizes = check(dataset)
    assert sum(sizes) == 1797
    assert [round(size / 1797, 2) for size in sizes] == [0.7, 0.15, 0.15]
    assert data.load("bundled").fingerprint == dataset.fingerprint
    rows = {tuple(row) for row in dataset.train.images[:, ::9].tolist()}
    assert not rows & {tuple(row) for row in dataset.test.images[:, ::9].tolist()}


def test_only_and_without_part_the_digits():
    test = data.load("bundled").test
    for digit in range(10):
        only, without = test.only(digit), test.without(digit)
        assert set(only.labels.tolist()) == {digit}
        assert len(only) + len(without) == len(test)
        assert torch.equal(without.images, test.images[test.labels != digit])
    with pytest.raises(LorakitError, match="0 to 9"):
        test.only(10)


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (bytes, "")], ids=["gzip", "plain"])
@pytest.mark.parametrize("choice", ["auto", "mnist"])
def test_given_files_are_read(tmp_path, choice, pack, suffix):
    small_mnist(tmp_path, pack=pack, suffix=suffix)
    dataset = data.load(choice, tmp_path)
    assert check(dataset) == [220, 20, 40]
    assert dataset.source == "mnist"
    assert f"not the original MNIST, from '{tmp_path}'" in dataset.why
    raw = read_idx(tmp_path / f"train-images-idx3-ubyte{suffix}")
    expected = (raw.double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(torch.cat([dataset.train.images, dataset.heldout.images]), expected.flatten(1).float())


def test_the_fingerprint_is_of_the_data_not_of_its_storage(tmp_path):
    small_mnist(tmp_path / "a")
    small_mnist(tmp_path / "b", pack=bytes, suffix="")
    small_mnist(tmp_path / "c", n=252)
    a, b, c = (data.load("mnist", tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_files_that_are_not_mnist_are_an_error_also_in_auto(tmp_path):
    labels = (np.arange(240) % 10).astype(np.uint8)
    for name, content, says in (
        (TRAIN_IMAGES, idx(np.zeros((240, 14, 14), np.uint8)), "28×28"),
        (TRAIN_LABELS, idx(labels[1:]), "240"),
        (TRAIN_LABELS, idx(labels + 1), "label 10"),
        (TRAIN_LABELS, idx(labels // 2), "lack 5, 6"),
        (TRAIN_LABELS, idx(np.zeros((240, 1), np.uint8)), "labels"),
        (TRAIN_LABELS, b"cut", "delete it"),
    ):
        small_mnist(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(content)
        with pytest.raises(LorakitError, match=says):
            data.load("auto", tmp_path / "a")


@pytest.mark.parametrize("choice, says", [("fashion", "choose one of auto"), ("auto", "no dir"), ("mnist", "no dir")])
def test_wrong_arguments(tmp_path, choice, says):
    with pytest.raises(LorakitError, match=says):
        data.load(choice, tmp_path / "none")


def test_a_directory_that_lacks_files_is_left_alone(tmp_path, served, cache):
    small_mnist(tmp_path / "a")
    (tmp_path / "a" / TRAIN_LABELS).unlink()
    with pytest.raises(LorakitError, match=f"lacks {TRAIN_LABELS};"):
        data.load("mnist", tmp_path / "a")
    assert not cache.exists()
    assert f"just downloaded, since '{tmp_path / 'a'}' lacks {TRAIN_LABELS}" in data.load("auto", tmp_path / "a").why
    assert len(files_below(tmp_path / "a")) == 3


def test_mnist_is_downloaded_once_from_whichever_mirror_has_it(served, cache, monkeypatch, capfd):
    first = data.load("mnist")
    assert files_below(cache) == sorted(data._MNIST)
    monkeypatch.setattr(requests, "get", no_network)
    assert data.load("auto").fingerprint == first.fingerprint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spoil", ["missing", "corrupt", "unreachable", "unwritable"])
def test_what_cannot_be_downloaded_leaves_nothing_behind(served, cache, monkeypatch, spoil):
    if spoil == "missing":
        served.clear()
    elif spoil == "corrupt":
        served.update({name: content[:-1] for name, content in served.items()})
    elif spoil == "unreachable":
        monkeypatch.setattr(requests, "get", no_network)
    else:
        cache.parent.write_bytes(b"a file, not a directory")
    with pytest.raises(LorakitError, match=r"amazonaws.*googleapis.*--data-dir.*--data bundled"):
        data.load("mnist")
    assert re.search(r"^scikit-learn.*MNIST could not be downloaded", data.load("auto").why)
    assert files_below(cache) == []


def test_a_mirror_that_hangs_is_left(cache, monkeypatch):
    monkeypatch.setitem(data._SECONDS, "auto", 0.2)
    released = threading.Event()
    monkeypatch.setattr(requests, "get", lambda *_, **__: released.wait(60))
    assert "not done within" in data.load("auto").why
    assert files_below(cache) == []
    released.set()


def test_a_damaged_file_in_the_cache_is_an_error(served, cache):
    data.load("mnist")
    (cache / TRAIN_IMAGES).write_bytes(served[TRAIN_IMAGES][:-9])
    with pytest.raises(LorakitError, match="delete it and run again"):
        data.load("auto")
    (cache / TRAIN_IMAGES).unlink()
    assert data.load("mnist").source == "mnist"


@pytest.mark.parametrize("module, choice", [("pooch", "mnist"), ("sklearn.datasets", "bundled")])
def test_a_missing_package_is_named(monkeypatch, module, choice):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[digits\]'"):
        data.load(choice)


@pytest.mark.skipif(not (SHARED / TRAIN_IMAGES).is_file(), reason=f"no MNIST in {SHARED}")
def test_the_original_mnist():
    dataset = data.load("mnist", SHARED)
    assert check(dataset) == [55_000, 5_000, 10_000]
    assert dataset.why.startswith("MNIST from ")
    std, mean = torch.std_mean(dataset.train.images)
    assert max(abs(mean), abs(std - 1)) < 1e-3
    assert all(sha256((SHARED / name).read_bytes()) == digest for name, digest in data._MNIST.items())
