"""Four networks that read MNIST digits learn to read those of the US Postal Service, and still read MNIST.

    python -m benchmarks.real.usps            # the table: 4 s of CPU time for each training, three seeds
    python -m benchmarks.real.usps --tune     # the hyper-parameters' scores on the validation images

The digits fill the whole 28×28 image: 2,000 to train on, 1,000 for
validation, 8,000 to test. One choice of hyper-parameters for all four networks: the best mean validation score.
"""

from collections.abc import Iterator
from functools import cache, partial

from torch import nn

import lorakit as lk
from benchmarks.real import data, models
from benchmarks.real.compare import (
    Arm,
    Experiment,
    command_line,
    everything,
    judged_by,
    low_rank,
    percent,
)
from benchmarks.real.training import Batch, Recipe, accuracy, batches, nudge

BUDGET = 4.0
BATCH = 50


@cache
def parts() -> tuple[data.Images, data.Images, data.Images]:
    """Training, validation and test images, equally many of each digit."""
    known, test = data.usps(stretched=True).split(300, seed=0)
    return (*known.split(200, seed=1), test)


@cache
def old_images() -> data.Images:
    """MNIST's test images."""
    return data.mnist("test")


def stream(name: str, seed: int) -> Iterator[Batch]:
    """Batches of images that are moved by up to one pixel."""
    return batches(parts()[0], models.digit_input(name), BATCH, seed, nudge)


def experiment(name: str) -> Experiment:
    """One of the four networks."""
    _, validation, test = parts()
    images = {"validation": validation, "USPS test": test, "MNIST test": old_images()}
    marks = {title: percent(accuracy, some, models.digit_input(name)) for title, some in images.items()}
    return Experiment(partial(models.mnist_cnn, name), partial(stream, name), marks["validation"], judged_by(marks))


def lora(rank: int, lr: float, mode: str) -> Arm:
    """An adapter on every convolution and every linear layer."""
    choose = low_rank(lk.LoRA(rank), [nn.Conv2d, nn.Linear], mode)  # type: ignore[arg-type]
    return Arm(f"LoRA r={rank} lr={lr:g} {mode}", choose, Recipe(lr, seconds=BUDGET))


def full(lr: float) -> Arm:
    """Full fine-tuning."""
    return Arm(f"full lr={lr:g}", everything, Recipe(lr, seconds=BUDGET))


CANDIDATES = [
    *(full(lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)),
    *(lora(4, lr, "beside") for lr in (3e-3, 1e-2)),
    *(lora(8, lr, "beside") for lr in (3e-3, 1e-2, 3e-2)),
    *(lora(rank, 1e-2, "weight") for rank in (8, 16)),
    lora(16, 1e-2, "beside"),
]
ARMS = [full(1e-2), lora(16, 1e-2, "weight")]


def main() -> None:
    """The command line."""
    command_line(__doc__ or "", {name: partial(experiment, name) for name in models.MNIST_CNNS}, ARMS, CANDIDATES)


if __name__ == "__main__":
    main()
