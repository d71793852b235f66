"""A ResNet-20 for CIFAR-10 on JPEG images: Conv-LoRA against full fine-tuning, with the same CPU time for each.

python -m benchmarks.real.resnet [SECONDS]
"""

import sys

import torch
from torch import Tensor, nn

import lorakit as lk
from benchmarks.real.data import cifar10
from benchmarks.real.models import resnet
from benchmarks.real.training import Recipe, accuracy, batches, flip_and_crop, train

STEPS_PER_SECOND = 3.5


def prepare(pixels: Tensor) -> Tensor:
    """As the network was trained: ImageNet's mean and deviation of each colour."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels / 255 - mean) / deviation


def arm(name: str) -> tuple[nn.Module, list[nn.Parameter], float]:
    """The pretrained network, what is trained in it, and the learning rate."""
    model = resnet(20)
    if name == "full fine-tuning":
        return model, list(model.parameters()), 1e-3
    lk.attach(model, lk.LoRA(rank=8), [nn.Conv2d, nn.Linear])
    return model, lk.adapter_parameters(model), 3e-3


def main(seconds: float) -> None:
    """Print a row for the base and for each arm."""
    torch.set_num_threads(1)
    train_images, test_images = cifar10("train"), cifar10("test")
    print(f"base: {accuracy(resnet(20), test_images, prepare):.2%}")
    for name in ("full fine-tuning", "Conv-LoRA, rank 8"):
        torch.manual_seed(0)
        model, parameters, lr = arm(name)
        recipe = Recipe(lr, int(seconds * STEPS_PER_SECOND), "adamw", seconds=seconds)
        run = train(model, parameters, batches(train_images, prepare, 128, 0, flip_and_crop), recipe)
        count = sum(p.numel() for p in parameters)
        print(
            f"{name}: {accuracy(model, test_images, prepare):.2%}, {count:,} numbers trained, "
            f"{run.steps} steps in {run.cpu:.0f} s of CPU time"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
