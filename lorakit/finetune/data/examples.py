"""Examples: sequences of tokens, of which it is known whether they are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.finetune.data.report import Report


@dataclass(frozen=True, eq=False)
class Example:
    """What one sequence is trained on."""

    ids: NDArray[np.int64]
    """Tokens, (n,)."""
    mask: NDArray[np.bool_]
    """Which of them are trained on, (n,); never the first, as nothing predicts it."""
    where: str

    @property
    def tokens(self) -> list[int]:
        """The tokens."""
        found: list[int] = self.ids.tolist()
        return found

    @property
    def trained(self) -> list[bool]:
        """Whether each token is trained on."""
        found: list[bool] = self.mask.tolist()
        return found

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded(Sequence[Example]):
    """Examples, and what became of the rows."""

    examples: list[Example]
    report: Report

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def digest(self) -> str:
        """A checksum of all tokens and of what is trained: equal for the same data in the same order."""
        found = sha256()
        for example in self.examples:
            found.update(len(example).to_bytes(8, "little"))
            found.update(example.ids.tobytes())
            found.update(example.mask.tobytes())
        return found.hexdigest()
