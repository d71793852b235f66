"""How large everything is: the full story, and a quick one for tests."""

from dataclasses import dataclass, field

from examples.sql_and_javascript.pretrain import QUICK as QUICK_BASE
from examples.sql_and_javascript.pretrain import Recipe


@dataclass(frozen=True)
class Plan:
    """Sizes, steps and learning rates; those of learning were chosen on validation data (see README.md)."""

    base: Recipe = field(default_factory=Recipe)
    length: int = 160
    """Tokens of a pair at most."""
    steps: int = 600
    batch: int = 16
    rank: int = 32
    adapter_rate: float = 3e-3
    full_rate: float = 2e-3
    adapter_rates: tuple[float, ...] = (1.5e-3, 3e-3, 5e-3)
    full_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """What `--tune` tries."""
    javascript: tuple[int, int, int] = (6000, 200, 300)
    """Pairs to train on, for validation, to test."""
    staff: tuple[int, int, int] = (3000, 200, 300)
    """The same of the generated questions, which stand in for the real ones."""
    test: int | None = None
    """Of each set to test on, the first so many; all by default."""
    samples: int = 6
    seed: int = 0


DEFAULT = Plan()
QUICK = Plan(
    base=QUICK_BASE,
    length=96,
    steps=40,
    batch=8,
    rank=8,
    adapter_rate=1e-2,
    full_rate=3e-3,
    javascript=(400, 32, 24),
    staff=(400, 32, 24),
    test=24,
    samples=2,
)
