"""A weight's fingerprint: enough to tell that an adapter meets the base it was trained on."""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_SAMPLES = 256
_BLOCK = 2**14
"""Words of 8 bytes that are summed up together: half a dozen of such blocks stay in a processor's cache."""


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor that may be sharded; then every process must ask for it."""
    # A DTensor; its class is not imported here, since that takes longer than all of lorakit.
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def fingerprint(*parts: Tensor) -> str | None:
    """A hash of 256 values spread evenly over the weight, or over each tensor that it is stored in.

    None for a weight without values: on `meta`, or stored in no tensor.

    It takes microseconds, whatever the weight's size. Any training step changes nearly every value of a weight, so
    two different checkpoints of one architecture are told apart.
    """
    if not parts or any(part.is_meta for part in parts):
        return None
    return digest_of(_sampled(part) for part in parts)


def _sampled(part: Tensor) -> Any:
    """The bytes of its samples."""
    if type(part) in _PLAIN and part.dtype in _KNOWN_TO_NUMPY and part.is_cpu and part.is_contiguous():
        # By way of NumPy, in a third of the time: the same bytes.
        values = part.detach().numpy().reshape(-1)
        return values[places_of(values.size, values.itemsize).numpy()].data
    flat = whole(part.detach()).reshape(-1)
    places = places_of(flat.numel(), flat.element_size()).to(flat.device)
    return flat[places].view(torch.uint8).cpu().numpy().tobytes()


def places_of(size: int, width: int) -> Tensor:
    """Which of so many values of this width in bytes a fingerprint is of."""
    count = _SAMPLES * (4 if width == 1 else 1)  # a byte of a quantized weight says less
    return _places(min(count, size), size)


def digest_of(samples: Iterable[Any]) -> str:
    """The fingerprint of a weight whose samples, of each tensor that it is stored in, are these bytes."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()[:32]


_PLAIN = (Tensor, torch.nn.Parameter)
_KNOWN_TO_NUMPY = (torch.float32, torch.float16, torch.float64)


@lru_cache(maxsize=64)
def _places(count: int, size: int) -> Tensor:
    """That many indices spread evenly over so many values: alike for all weights of one size."""
    return torch.linspace(0, size - 1, count, dtype=torch.float64, device="cpu").long()


def checksum(*parts: Tensor) -> str | None:
    """A number of 128 bits that depends on every byte of a weight, or of each tensor that it is stored in.

    None for a weight without values. It tells apart what chance or a mistake made different; it is no seal against
    someone who looks for two weights of one checksum. The same bytes give the same on every device.

    Each block of 2¹⁴ words x is summed up as Σ w·x in whole numbers modulo 2⁶⁴, where w depends on the place, and the
    sums are hashed, with what is left at the end. It takes less than half the time of a hash of the bytes, and on a GPU
    it leaves the weight where it is.
    """
    if not parts or any(part.is_meta for part in parts):
        return None
    digest = hashlib.sha256()
    for part in parts:
        flat = whole(part.detach()).reshape(-1)
        if flat.stride(-1) != 1:  # a single number may have any, and counts as contiguous
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = flat.view(torch.uint8)
        digest.update(data.numel().to_bytes(8, "little"))
        words = data.numel() // (8 * _BLOCK) * _BLOCK
        if data.storage_offset() % 8:
            data = data.clone()  # words lie at multiples of their size
        blocks = data[: 8 * words].view(torch.int64).view(-1, _BLOCK)
        weights = _weights().to(data.device)
        few = 4 if data.device.type == "cpu" else 2**10
        for some in blocks.split(few) if words else ():
            # With its upper bits added: the highest bit, a sign, would else count alike in all words, and even numbers
            # of them not at all. By 29, as no two bits that are signs in any dtype are so far apart.
            digest.update((some >> 29).add_(some).mul_(weights).sum(-1).cpu().numpy().data)
        digest.update(data[8 * words :].cpu().numpy().data)
    return digest.hexdigest()[:32]


_remembered = WeakIdKeyDictionary()
"""Weight → its marks when its checksum was taken, and the checksum."""


def remembered_checksum(sample: str | None, *parts: Tensor) -> str | None:
    """`checksum` of a weight with this fingerprint, taken anew only if the weight may have changed since.

    A base is frozen while its adapters train: it is read as a whole for the first save, and for no other. What is
    written past torch's count of changes (`.data`) is noticed by the fingerprint.
    """
    if not parts or not all(type(part) in _PLAIN and not part.is_inference() for part in parts):
        return checksum(*parts)
    marks = sample, *((part.data_ptr(), part._version, part.shape, part.dtype) for part in parts)
    found = _remembered.get(parts[0])
    if found is None or found[0] != marks:
        _remembered[parts[0]] = found = marks, checksum(*parts)
    known: str | None = found[1]
    return known


@lru_cache(maxsize=1)
def _weights() -> Tensor:
    """Odd numbers of 64 bits, all over the place: the SplitMix64 generator (Steele et al. 2014) of 1, 2, 3..."""
    z = torch.arange(1, _BLOCK + 1, device="cpu") * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return (z ^ ((z >> 31) & (2**33 - 1))) | 1


def _signed(number: int) -> int:
    """The number of 64 bits, as two's complement has it."""
    return number - 2**64 if number >= 2**63 else number
