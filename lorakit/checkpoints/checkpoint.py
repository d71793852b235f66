"""A checkpoint of any module by its names: shapes, dtypes and places. Values are read one tensor at a time."""

import ctypes
import re
from collections.abc import Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.checkpoints.shards import Shard, Stored
from lorakit.errors import LorakitError
from lorakit.fingerprint import digest_of, fingerprint, places_of, whole

PIECE = 2**22
"""Bytes that are copied or compared at a time."""


class Part(NamedTuple):
    """One file of weights of a checkpoint, as it is or as it would be written."""

    name: str
    names: tuple[str, ...]
    """Its tensors, in the order of their bytes."""
    shard: Shard | None = None
    """If it is a safetensors file."""
    source: str | None = None
    """The name of the file that it is now, if it is one."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Names → shape, dtype and place, without the values of files. `open_checkpoint` makes one; it never changes."""

    where: str
    """What errors call it."""
    tensors: Mapping[str, Stored]
    parts: tuple[Part, ...]
    folder: Path | None = None
    """The directory whose other files belong to it."""
    index: str | None = None
    """The file there that says which shard holds what."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of one that is in memory."""
    model: nn.Module | None = None
    """The module that it is the state of."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that are not stored, and the name that each is stored under."""

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, contiguous on the CPU.

        Raises:
            LorakitError: there is none of that name, or its file has changed.
        """
        stored = self[name]
        if stored.file is None:
            return whole(self.memory[name].detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)
        if not torch.Size(stored.shape).numel():
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        try:
            flat = torch.empty(_span(stored), dtype=stored.dtype, device="cpu")
            with stored.file.open("rb") as file:
                file.seek(stored.begin)
                got = file.readinto(raw(flat))
        except (OSError, RuntimeError, ValueError) as error:
            raise LorakitError(f"cannot read {name!r} of {stored.file}: {error}") from None
        self._check_length(name, got, flat.numel() * flat.element_size())
        if stored.strides is None:
            return flat.view(stored.shape)
        return flat.as_strided(stored.shape, stored.strides).clone(memory_format=torch.contiguous_format)

    def fingerprint(self, name: str) -> str | None:
        """The tensor's fingerprint; of a file's no more is read than it is of.

        Raises:
            LorakitError: there is none of that name, or its file has changed.
        """
        stored = self[name]
        if stored.file is None:
            return fingerprint(self.memory[name].detach())
        if stored.strides is not None:
            return fingerprint(self.read(name))
        width, samples = stored.dtype.itemsize, []
        try:
            with stored.file.open("rb") as file:
                for place in places_of(torch.Size(stored.shape).numel(), width).tolist():
                    file.seek(stored.begin + place * width)
                    samples.append(file.read(width))
        except OSError as error:
            raise LorakitError(f"cannot read {name!r} of {stored.file}: {error}") from None
        sample = b"".join(samples)
        self._check_length(name, len(sample), len(samples) * width)
        return digest_of([sample])

    def _check_length(self, name: str, got: int, wanted: int) -> None:
        if got != wanted:
            raise LorakitError(
                f"cannot read {name!r} of {self[name].file}: it has become shorter; do not change it meanwhile"
            )

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of the tensor, a few at a time."""
        stored = self[name]
        if stored.file is None or stored.strides is not None:
            bytes_ = memoryview(raw(self.read(name)))
            yield from (bytes_[i : i + PIECE] for i in range(0, len(bytes_), PIECE))
            return
        try:
            with stored.file.open("rb") as file:
                file.seek(stored.begin)
                for begin in range(0, stored.bytes, PIECE):
                    wanted = min(PIECE, stored.bytes - begin)
                    piece = file.read(wanted)
                    if len(piece) != wanted:  # a part of the last piece too would be taken for all of it
                        raise OSError("it has become shorter; do not change it meanwhile")
                    yield piece
        except OSError as error:
            raise LorakitError(f"cannot read {name!r} of {stored.file}: {error}") from None

    def tied(self, name: str) -> list[str]:
        """The other names under which the same values are stored: not copies, the same memory or bytes."""
        mine = self._place(name)
        if mine is None:
            return []
        return [other for other in self.tensors if other != name and self._place(other) == mine]

    def _place(self, name: str) -> object:
        stored = self.tensors[name]
        if stored.file is not None:
            return (stored.file, stored.begin) if stored.bytes else None
        tensor = self.memory[name]
        return (tensor.device, tensor.data_ptr()) if stored.bytes and not hasattr(tensor, "full_tensor") else None

    def __getitem__(self, name: str) -> Stored:
        """Shape, dtype and place of a tensor."""
        if name not in self.tensors:
            raise LorakitError(f"{self.where} holds no {name!r}")
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def largest(self) -> int:
        """The bytes of its largest tensor."""
        return max((stored.bytes for stored in self.tensors.values()), default=0)

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(stored.bytes for stored in self.tensors.values())


def in_memory(tensors: Mapping[str, Any], where: str, model: nn.Module | None = None) -> Checkpoint:
    """The checkpoint that these tensors are.

    Raises:
        LorakitError: what is no tensor, or has no values.
    """
    problems, found = [], {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            problems.append(f"the key {name!r} is no text")
        elif not isinstance(tensor, Tensor):
            problems.append(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        elif tensor.is_meta:
            problems.append(f"{name!r} is on 'meta' and has no values")
        elif tensor.layout != torch.strided or tensor.is_quantized:
            problems.append(f"{name!r} is {tensor.layout}, {tensor.dtype}; only plain tensors can be read")
        else:
            found[name] = tensor
    check(where, problems, found)
    stored = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    return Checkpoint(where, stored, (Part("model.safetensors", tuple(stored)),), memory=found, model=model)


def check(where: str, problems: list[str], found: Sized) -> None:
    """One error that lists what is wrong with a checkpoint, if anything is.

    Raises:
        LorakitError: something is, or it holds nothing.
    """
    if not problems and not found:
        problems = ["it holds no tensor"]
    if problems:
        raise LorakitError(listed(f"{where} is no checkpoint that can be used:", problems))


def listed(title: str, problems: list[str], most: int = 40) -> str:
    """Problems under a title, each on a line, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "".join([title, *(f"\n  - {problem}" for problem in [*problems[:most], *more])])


def shortened(text: str, most: int = 5) -> str:
    """A message as `listed` makes it, with no more than so many of its problems, and how many more there are."""
    lines = text.split("\n")
    bullets = [line for line in lines if line.startswith("  - ")]
    last = re.fullmatch(r"  - and (\d+) more", bullets[-1]) if bullets else None
    left_out = int(last[1]) if last else 0
    shown = bullets[:-1] if last else bullets
    if len(shown) <= most:
        return text
    first = lines.index(bullets[0])
    before, after = lines[:first], [line for line in lines[first:] if not line.startswith("  - ")]
    return "\n".join([*before, *shown[:most], f"  - and {len(shown) - most + left_out} more", *after])


def raw(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, to read or to write."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else bytearray()


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library has a way to.

    What is kept of one weight lies between what was freed of several, and malloc alone returns only what is at the end:
    of a large checkpoint the holes would add up to several of its largest tensors.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether both hold the same bytes under this name; both must have it in one shape and dtype."""
    return all(bytes(a) == bytes(b) for a, b in zip(one.pieces(name), other.pieces(name), strict=True))


def _span(stored: Stored) -> int:
    """How many numbers it lies over in the file."""
    if stored.strides is None:
        return torch.Size(stored.shape).numel()
    return sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True)) + 1
