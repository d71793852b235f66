"""Where the digits come from: MNIST where it can be had, else the small digits that scikit-learn brings along."""

import hashlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Literal, NoReturn, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.digits.idx import read_idx
from lorakit.errors import LorakitError

Choice = Literal["auto", "mnist", "bundled"]

# LeCun, Cortes, Burges: the files of yann.lecun.com/exdb/mnist, by sha256.
_MNIST = {
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
}
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_ORIGINAL = "a2093752a929005f"  # the fingerprint of the original MNIST

_MEAN, _STD = 0.1307, 0.3081  # of MNIST's training pixels in 0..1
_HELD_OUT = 12  # one in twelve: the last 5,000 of MNIST's 60,000

_TIMEOUT = (3.0, 5.0)  # seconds to connect, and without a byte
_SECONDS: dict[Choice, float] = {"auto": 20.0, "mnist": 600.0}  # for the whole download


@dataclass(frozen=True, eq=False)
class Digits:
    """Handwritten digits and what they are.

    Attributes:
        images: (n, 784) float32, one 28×28 image a row, white on black, of about zero mean and unit variance.
        labels: (n,) int64 in 0..9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, digit: int) -> "Digits":
        """Those that show `digit`, in the same order."""
        mask = self._shows(digit)
        return Digits(self.images[mask], self.labels[mask])

    def without(self, digit: int) -> "Digits":
        """Those that show another digit than `digit`, in the same order."""
        mask = ~self._shows(digit)
        return Digits(self.images[mask], self.labels[mask])

    def _shows(self, digit: int) -> Tensor:
        if digit not in range(10):
            raise LorakitError(f"no digit is {digit!r}; give one of 0 to 9")
        return self.labels == digit


@dataclass(frozen=True, eq=False)
class Dataset:
    """Digits to train on, to choose by, and to report on; each split holds every digit."""

    source: Literal["mnist", "bundled"]
    why: str
    """One sentence: which data, from where, and why not the other."""
    train: Digits
    heldout: Digits
    test: Digits
    fingerprint: str
    """16 hex digits that are the same for the same data in the same splits, however it was stored."""


def load(choice: Choice = "auto", data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Read the digits, and download MNIST if need be.

    Args:
        choice: "mnist" is 55,000 images to train on, 5,000 held out and 10,000 to test; "bundled" is scikit-learn's
            1,797 digits of 8×8 pixels, enlarged to 28×28, in about 70:15:15; "auto" is MNIST if its files are in
            `data_dir` or in the cache or come within 20 seconds, else the bundled digits.
        data_dir: a directory with MNIST's four IDX files, gzip-compressed or not. It is only read, and not for
            "bundled". What is downloaded goes to the user's cache directory, or to `$LORAKIT_CACHE` if that is set.

    Raises:
        LorakitError: MNIST was asked for and cannot be had, a file is damaged or not MNIST's, `data_dir` does not
            exist, or a package is missing.
    """
    if choice not in get_args(Choice):
        raise LorakitError(f"no data is called {choice!r}; choose one of {', '.join(get_args(Choice))}")
    if choice == "bundled":
        return _bundled("as asked for")
    lacking = ""
    if data_dir is not None:
        given = Path(os.path.expanduser(data_dir))
        if not os.path.isdir(given):
            raise LorakitError(f"there is no directory '{given}'; give one with MNIST's four files, or leave it out")
        missing = _missing(given)
        if not missing:
            return _mnist(given, "as given")
        lacking = f"'{given}' lacks {', '.join(missing)}"
        if choice == "mnist":
            raise LorakitError(f"no MNIST: {lacking}; put them there, or leave out --data-dir to download all four")
    cache = _cache()
    since = f", since {lacking}" if lacking else ""
    if not _missing(cache):
        return _mnist(cache, f"kept from an earlier download{since}")
    with _quiet(_need("pooch").get_logger()):
        failures = _download(cache, _SECONDS[choice])
    if not failures:
        return _mnist(cache, f"just downloaded{since}")
    failed = f"MNIST could not be downloaded ({'; '.join(failures)})"
    if choice == "mnist":
        raise LorakitError(f"{failed}; give --data-dir with its four files, or choose --data bundled")
    return _bundled(f"since {f'{lacking} and ' if lacking else ''}{failed}")


def _mnist(directory: Path, how: str) -> Dataset:
    images, labels = _labelled(directory, "train")
    kept = len(labels) - len(labels) // _HELD_OUT
    splits = [(images[:kept], labels[:kept]), (images[kept:], labels[kept:]), _labelled(directory, "t10k")]
    for name, (_, labels) in zip(("training", "held-out", "test"), splits, strict=True):
        absent = [str(digit) for digit in range(10) if not (labels == digit).any()]
        if absent:
            _not_mnist(directory, f"its {len(labels):,} {name} labels lack {', '.join(absent)}")
    fingerprint = _fingerprint(splits)
    name = "MNIST" if fingerprint == _ORIGINAL else "images in MNIST's format, but not the original MNIST,"
    why = f"{name} from '{directory}', {how}"
    train, heldout, test = (_digits(*split, 255) for split in splits)
    return Dataset("mnist", why, train, heldout, test, fingerprint)


def _labelled(directory: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) and labels (n,), both uint8, checked against each other."""
    images, labels = (_find(directory, f"{prefix}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    assert images is not None and labels is not None
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or x.shape[1:] != (28, 28):
        _not_mnist(images, f"it holds an array of {'×'.join(map(str, x.shape))}, not of n×28×28")
    if y.ndim != 1 or len(y) != len(x):
        _not_mnist(labels, f"it holds {'×'.join(map(str, y.shape))} labels for {len(x):,} images in '{images.name}'")
    if len(y) and y.max() > 9:
        _not_mnist(labels, f"it holds a label {y.max()}; digits are 0 to 9")
    return x, y


def _not_mnist(path: Path, what: str) -> NoReturn:
    raise LorakitError(f"'{path}' is not MNIST: {what}; give the original files, or choose --data bundled")


def _bundled(reason: str) -> Dataset:
    """Each digit's samples are dealt to the splits 14:3:3 in turn: stratified, and without a random generator."""
    source = _need("sklearn.datasets").load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8)  # (1797, 8, 8) in 0..16
    labels = torch.from_numpy(source.target).to(torch.uint8)
    turn = torch.empty(len(labels), dtype=torch.int64)
    for digit in range(10):
        of_digit = labels == digit
        turn[of_digit] = torch.arange(int(of_digit.sum())) * 7 % 20  # 7 has no factor of 20: neighbours are dealt apart
    splits = [(images[part], labels[part]) for part in (turn < 14, (turn >= 14) & (turn < 17), turn >= 17)]
    why = f"scikit-learn's {len(labels):,} digits of 8×8 pixels, enlarged to 28×28, {reason}"
    train, heldout, test = (_digits(*split, 16) for split in splits)
    return Dataset("bundled", why, train, heldout, test, _fingerprint(splits))


def _digits(images: Tensor, labels: Tensor, white: int) -> Digits:
    pixels = images.float().div_(white)
    if pixels.shape[1:] != (28, 28):
        pixels = F.interpolate(pixels.unsqueeze(1), size=(28, 28), mode="bilinear", align_corners=False)
    return Digits(pixels.flatten(1).sub_(_MEAN).div_(_STD), labels.long())


def _fingerprint(splits: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Of the bytes before normalisation, which are the same on every machine."""
    _need("numpy")
    digest = hashlib.sha256()
    for images, labels in splits:
        digest.update(repr((*images.shape, *labels.shape)).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _cache() -> Path:
    root = os.environ.get("LORAKIT_CACHE") or _need("pooch").os_cache("lorakit")
    return Path(os.path.expanduser(root)) / "mnist"


def _find(directory: Path, name: str) -> Path | None:
    """The file as it is downloaded, or unpacked."""
    names = (name, name.removesuffix(".gz"))
    return next((directory / name for name in names if os.path.isfile(directory / name)), None)


def _missing(directory: Path) -> list[str]:
    return [name for name in _MNIST if _find(directory, name) is None]


def _download(directory: Path, seconds: float) -> list[str]:
    """Get what `directory` lacks, each file whole or not at all.

    Returns:
        What went wrong at each mirror; empty if all files are there now.
    """
    end = monotonic() + seconds
    failures = []
    for i, mirror in enumerate(_MIRRORS):
        share = (end - monotonic()) / (len(_MIRRORS) - i)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Within the cache, so that a finished file is moved into its place in one step.
            with TemporaryDirectory(prefix="partial-", dir=directory, ignore_cleanup_errors=True) as partial:
                _within(share, _fetch, mirror, directory, partial, share)
        except (OSError, ValueError) as error:
            failures.append(f"{urlsplit(mirror).hostname}: {_reason(error)}")
        else:
            return []
    return failures


def _fetch(mirror: str, directory: Path, partial: str, seconds: float) -> None:
    pooch, requests = _need("pooch"), _need("requests")
    end = monotonic() + seconds

    def get(url: str, path: str, _: object) -> None:
        headers = {"Accept-Encoding": "identity"}  # the files are compressed already
        with requests.get(url, stream=True, timeout=_TIMEOUT, headers=headers) as answer, open(path, "wb") as file:
            answer.raise_for_status()
            for chunk in answer.iter_content(1 << 16):
                if monotonic() > end:
                    raise TimeoutError("too slow")
                file.write(chunk)

    for name in _missing(directory):
        whole = pooch.retrieve(mirror + name, f"sha256:{_MNIST[name]}", name, partial, downloader=get)
        os.replace(whole, directory / name)


def _within(seconds: float, action: Callable[..., None], *arguments: object) -> None:
    """Call `action`, and leave it behind in its thread when time is up: looking up a host takes no timeout."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action(*arguments)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done within {seconds:.0f} seconds")
    if failures:
        raise failures[0]


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause that the system gave; the layers around it repeat the URL and more."""
    reason = ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            reason = str(cause) if cause.filename else cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return reason or "it sent something else than the original file"  # pooch found another checksum


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LorakitError(f"the digits need {module}, which is not here: pip install 'lorakit[digits]'") from error
