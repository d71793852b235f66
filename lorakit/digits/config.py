"""What a run of the experiment is asked for, checked before any work."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorakit.digits.network import BATCH
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Config:
    """What a run is asked for."""

    out: Path
    digit: int | None = None
    """The digit to improve; None for the base's worst."""
    batches: int = 100
    rehearse: float = 0.5
    """Share of other digits in the batches of the rehearsed adapter."""
    seed: int = 0
    fresh: bool = False


def check(config: Config) -> None:
    """Refuse a configuration that makes no sense.

    Raises:
        LorakitError: naming the option.
    """
    if config.digit is not None and not 0 <= config.digit <= 9:
        raise LorakitError(f"--digit {config.digit}: a digit is 0 to 9")
    if not 0 <= config.seed < 2**32:
        raise LorakitError(f"--seed {config.seed}: a whole number from 0 to {2**32 - 1}")
    if config.batches < 1:
        raise LorakitError(f"--batches {config.batches}: at least one batch")
    if not 0.1 <= config.rehearse <= 0.9:
        raise LorakitError(f"--rehearse {config.rehearse}: a share from 0.1 to 0.9 of each batch of {BATCH}")


def make_writable(out: Path) -> None:
    """Make the directory for the results, and be sure before any work that it can be written to.

    Raises:
        LorakitError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise LorakitError(f"--out {out}: {error.strerror or error}; name a directory to write to") from None
