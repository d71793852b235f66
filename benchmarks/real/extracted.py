"""What is left of a full fine-tune when it is extracted as an adapter, on a network that others trained.

    python -m benchmarks.real.extracted       # about a minute of CPU time

Four MNIST networks are trained as a whole on USPS digits, as in `benchmarks.real.usps`, and stories260K on SQL, as in
`benchmarks.real.stories`. From each pair of checkpoints adapters of several ranks are extracted and loaded on the base.
"""

import copy
import os
from collections.abc import Callable

from torch import nn

import lorakit as lk
from benchmarks.real import models, stories, usps
from benchmarks.real.compare import Arm, Experiment, adapt
from lorakit.tables import table

BOUNDS: list[dict[str, float]] = [{"rank": r} for r in (1, 2, 4, 8, 16)] + [{"energy": e} for e in (0.5, 0.9, 0.99)]


def rows_of(name: str, experiment: Experiment, arm: Arm) -> list[list[str]]:
    """The base, the fine-tune, and what is left of it at each bound."""
    base = experiment.make()
    tuned, _, count = adapt(experiment, arm, seed=0)
    kept = [marks(experiment, base), marks(experiment, tuned)]
    rows = [[name, "base", "", "", kept[0]], ["", "full fine-tuning", f"{count:,}", "", kept[1]]]
    for bound in BOUNDS:
        adapter, report = lk.extract(base, tuned, **bound)  # type: ignore[arg-type]
        model = copy.deepcopy(base)
        lk.load(model, adapter)
        what = ", ".join(f"{key}={value:g}" for key, value in bound.items())
        rows.append(["", what, f"{adapter.parameters:,}", f"{report.error:.3f}", marks(experiment, model)])
    return rows


def marks(experiment: Experiment, model: nn.Module) -> str:
    """What the experiment measures of a network."""
    return "  ".join(f"{title} {value:.2f}" for title, value in experiment.judge(model.eval()).items())


def main() -> None:
    """Print the table."""
    cases: dict[str, tuple[Callable[[], Experiment], Arm]] = {
        name: (lambda name=name: usps.experiment(name), usps.full(1e-2)) for name in models.MNIST_CNNS
    }
    cases["stories260K on SQL"] = lambda: stories.experiment(stories.sql), stories.ARMS[0]
    rows = [row for name, (make, arm) in cases.items() for row in rows_of(name, make(), arm)]
    print(table(["network", "what", "numbers", "error", "measured"], rows, right=("numbers", "error")))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
