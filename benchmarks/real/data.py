"""The real data sets, read where they lie; nothing is copied or cached."""

import os
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.digits.idx import read_idx

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[3] / "shared"))
"""Where the data and the weights lie: by default a folder beside the repository."""

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of CIFAR-10's own labels, which is alphabetical."""

_CIFAR_TARS = {"train": "cifar10_train10k_jpg.tar", "test": "cifar10_test_jpg.tar"}
_MNIST_FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Images:
    """Images with their classes."""

    pixels: Tensor
    """uint8, (n, channels, height, width)."""
    labels: Tensor
    """int64, (n,)."""

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def take(self, index: Tensor) -> "Images":
        """Those of an index."""
        return Images(self.pixels[index], self.labels[index])

    def split(self, first: int, seed: int) -> tuple["Images", "Images"]:
        """Two parts, drawn at random with equal shares of each class; `first` images of each class in the first."""
        generator = torch.Generator().manual_seed(seed)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label in self.labels.unique():
            mine = (self.labels == label).nonzero().flatten()
            mine = mine[torch.randperm(len(mine), generator=generator)]
            parts[0].append(mine[:first])
            parts[1].append(mine[first:])
        return self.take(torch.cat(parts[0])), self.take(torch.cat(parts[1]))


def cifar10(split: str, every: int = 1) -> Images:
    """10,000 JPEG images, "train" or "test", 32×32 in colour, or one in so many; the class is the folder's name."""
    from PIL import Image

    pixels, labels = [], []
    with tarfile.open(SHARED / "data" / "cifar10" / _CIFAR_TARS[split]) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        for member in members[::every]:
            file = tar.extractfile(member)
            assert file is not None
            with Image.open(BytesIO(file.read())) as image:
                pixels.append(np.asarray(image.convert("RGB")))
            labels.append(CIFAR_CLASSES.index(Path(member.name).parent.name))
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def mnist(split: str) -> Images:
    """60,000 images of "train" or 10,000 of "test", 28×28."""
    folder, name = SHARED / "data" / "mnist", _MNIST_FILES[split]
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    return Images(pixels.unsqueeze(1), read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long())


def usps_raw() -> Images:
    """The 11,000 images as they are, 16×16, upright, light on dark; 1,100 of each digit."""
    from scipy.io import loadmat

    table = loadmat(SHARED / "data" / "usps" / "USPS.mat")
    pixels = torch.from_numpy(table["fea"].copy()).reshape(-1, 1, 16, 16)
    return Images(pixels, torch.from_numpy(table["gnd"].astype(np.int64)).flatten() - 1)


def usps(stretched: bool = False) -> Images:
    """USPS laid out as MNIST is: the digit in a box of 20×20, its centre of mass in the middle of 28×28.

    Or `stretched` to fill 28×28: much further from MNIST.
    """
    raw = usps_raw()
    if stretched:
        large = F.interpolate(raw.pixels.float(), size=(28, 28), mode="bilinear", align_corners=False)
        return Images(large.round().to(torch.uint8), raw.labels)
    box = F.interpolate(raw.pixels.float(), size=(20, 20), mode="bicubic", align_corners=False)
    return Images(_centred(box.clamp(0, 255).round().to(torch.uint8), 28), raw.labels)


def text() -> str:
    """Tiny Shakespeare, 1.1 million characters."""
    return (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")


def _centred(pixels: Tensor, size: int) -> Tensor:
    """On a black square of that size, with the centre of mass as near to its middle as whole pixels allow."""
    n, _, height, width = pixels.shape
    mass = pixels.double().flatten(1).sum(1).clamp(min=1)
    rows = (pixels.double() * torch.arange(height).view(-1, 1)).flatten(1).sum(1) / mass
    columns = (pixels.double() * torch.arange(width)).flatten(1).sum(1) / mass
    middle = (size - 1) / 2
    tops = (middle - rows).round().long().clamp(0, size - height)
    lefts = (middle - columns).round().long().clamp(0, size - width)
    square = torch.zeros(n, 1, size, size, dtype=pixels.dtype)
    for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        square[i, :, top : top + height, left : left + width] = pixels[i]
    return square
