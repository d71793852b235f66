"""What is in a checkpoint, tensor by tensor: shapes, dtypes, norms, and what is zero or not finite."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.checkpoints.checkpoint import Checkpoint, give_back
from lorakit.checkpoints.opening import Source, open_checkpoint
from lorakit.checkpoints.rewrite import Progress

_BLOCK = 2**20
"""Numbers that are widened at a time."""


class SummarizedTensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch calls it: "bfloat16"."""
    norm: float | None
    """The Frobenius norm; None of whole numbers, and of what is not finite."""
    state: str
    """"" if it is in order; "zero" or "not finite" otherwise, and "empty" if it has no numbers. Of floats alone."""


@dataclass(frozen=True)
class CheckpointSummary:
    """What `summarize` found."""

    where: str
    files: tuple[str, ...]
    """The files that hold the tensors."""
    tensors: tuple[SummarizedTensor, ...]
    tied: Mapping[str, str]
    """Names that are not stored, and the name that each is stored under."""
    bytes: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return sum(self.dtypes.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many numbers of each dtype."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.dtype] += math.prod(tensor.shape)
        return dict(counts)

    def names(self, state: str) -> tuple[str, ...]:
        """The tensors in this state."""
        return tuple(tensor.name for tensor in self.tensors if tensor.state == state)

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps`."""
        return {
            "kind": "checkpoint",
            **asdict(self),
            "numbers": self.numbers,
            "dtypes": self.dtypes,
            "zero": self.names("zero"),
            "broken": self.names("not finite"),
            "tensors": [tensor._asdict() for tensor in self.tensors],
        }


def summarize(source: Source, progress: Progress | None = None) -> CheckpointSummary:
    """Look at every tensor of a checkpoint, one at a time.

    Raises:
        LorakitError: there is no checkpoint, or a damaged one.
    """
    checkpoint = open_checkpoint(source)
    done, found = 0, []
    for name, stored in checkpoint.tensors.items():
        if progress is not None:
            progress(done, checkpoint.bytes, name)
        found.append(_summarized(checkpoint, name))
        done += stored.bytes
    if progress is not None:
        progress(done, checkpoint.bytes, "")
    files = tuple(part.source or part.name for part in checkpoint.parts)
    return CheckpointSummary(checkpoint.where, files, tuple(found), dict(checkpoint.aliases), checkpoint.bytes)


def _summarized(checkpoint: Checkpoint, name: str) -> SummarizedTensor:
    stored = checkpoint[name]
    norm, state = None, ""
    if not stored.bytes:
        state = "empty"
    elif stored.dtype.is_floating_point or stored.dtype.is_complex:
        norm = _norm(checkpoint.read(name))
        state = "not finite" if norm is None else "" if norm else "zero"
        give_back()
    return SummarizedTensor(name, stored.shape, str(stored.dtype).removeprefix("torch."), norm, state)


@torch.no_grad()
def _norm(tensor: Tensor) -> float | None:
    """The Frobenius norm, in 64 bits; None if a number is not finite."""
    norms = []
    for block in tensor.reshape(-1).split(_BLOCK):
        wide = block.to(torch.complex128 if block.is_complex() else torch.float64).abs()
        largest = float(wide.max())  # NaN, if there is one
        if not math.isfinite(largest):
            return None
        # In units of the largest, whose squares neither overflow nor vanish.
        norms.append(largest * float(torch.linalg.vector_norm(wide / largest)) if largest else 0.0)
    return math.hypot(*norms)
