"""ResNet-20 for CIFAR-10 scores 10 points less on JPEG images: Conv-LoRA brings it up again, the base untouched.

    python -m benchmarks.real.resnet            # the table: 40 s of CPU time for each training, three seeds
    python -m benchmarks.real.resnet --tune     # the hyper-parameters' scores on the validation images

It trains on 10,000 JPEGs of the training images. The base was trained on those same images, as PNG, so they
are no use for choosing: 2,000 of the test images are for validation, and the other 8,000 are only reported.
"""

from functools import cache, partial

import torch
from torch import nn

import lorakit as lk
from benchmarks.real import data, models
from benchmarks.real.compare import (
    Arm,
    Experiment,
    command_line,
    everything,
    low_rank,
    percent,
)
from benchmarks.real.training import Recipe, accuracy, batches, flip_and_crop

BUDGET = 40.0
BATCH = 64
TARGETS = [nn.Conv2d, nn.Linear]


def make() -> nn.Module:
    """The pretrained network, in the memory layout in which a CPU convolves faster."""
    return models.resnet(20).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@cache
def training_images() -> data.Images:
    """10,000 JPEGs."""
    return data.cifar10("train")


def stream(seed: int, augmented: bool = True):  # type: ignore[no-untyped-def]
    """Batches, mirrored and shifted, or as they are."""
    return batches(training_images(), models.cifar_input, BATCH, seed, flip_and_crop if augmented else None)


def experiment() -> Experiment:
    """Validation and test images are apart; on the two together the base is known to score 81.03."""
    validation, test = data.cifar10("test").split(200, seed=0)
    chosen_by, reported = (percent(accuracy, part, models.cifar_input) for part in (validation, test))

    def judge(model: nn.Module) -> dict[str, float]:
        first, second = chosen_by(model), reported(model)
        share = len(validation) / (len(validation) + len(test))
        return {"validation": first, "test": second, "both": share * first + (1 - share) * second}

    return Experiment(make, stream, chosen_by, judge)


def lora(rank: int, lr: float, mode: str = "weight", augmented: bool = True) -> Arm:
    """An adapter on all convolutions and the head. BatchNorm keeps the base's statistics: the base must not change."""
    choose = low_rank(lk.LoRA(rank), TARGETS, mode)  # type: ignore[arg-type]
    name = f"LoRA r={rank} lr={lr:g} {mode}{'' if augmented else ' as they are'}"
    return Arm(name, choose, Recipe(lr, seconds=BUDGET), partial(stream, augmented=augmented))


def full(optimizer: str, lr: float, norm: str, augmented: bool = True) -> Arm:
    """Full fine-tuning."""
    decay = 1e-4 if optimizer == "sgd" else 0.0
    recipe = Recipe(lr, seconds=BUDGET, optimizer=optimizer, weight_decay=decay, norm=norm)  # type: ignore[arg-type]
    name = f"full {optimizer} lr={lr:g} BN {norm}{'' if augmented else ' as they are'}"
    return Arm(name, everything, recipe, partial(stream, augmented=augmented))


CANDIDATES = [
    *(full("adamw", lr, "eval") for lr in (3e-4, 1e-3, 3e-3)),
    full("adamw", 1e-3, "train"),
    *(full("sgd", lr, "train") for lr in (0.01, 0.03)),
    full("sgd", 0.003, "eval"),
    full("adamw", 1e-3, "eval", augmented=False),
    *(lora(8, lr) for lr in (3e-3, 1e-2)),
    lora(8, 3e-3, "beside"),
    *(lora(16, lr) for lr in (3e-3, 1e-2, 2e-2)),
    lora(4, 1e-2),
    lora(32, 1e-2),
    lora(16, 1e-2, augmented=False),
]
ARMS = [full("adamw", 1e-3, "eval", augmented=False), lora(16, 1e-2, augmented=False)]


def main() -> None:
    """The command line."""
    command_line(__doc__ or "", {"ResNet-20, CIFAR-10 as JPEG": experiment}, ARMS, CANDIDATES)


if __name__ == "__main__":
    main()
