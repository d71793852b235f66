"""One training loop for every arm of every comparison, and the accuracy it is judged by."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.data import Images

Batch = tuple[Tensor, Tensor]
Prepare = Callable[[Tensor], Tensor]
"""uint8 pixels → what the network takes."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the same seed, recipe and steps give the same result."""

    lr: float
    steps: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises; after it, it falls to zero along half a cosine."""
    norm: Literal["train", "eval"] = "eval"
    """BatchNorm by the statistics of the batch, which also moves the running ones, or by the running ones."""
    seconds: float = math.inf
    """Stop early after so much CPU time. The end then depends on the machine, and the rate does not reach zero."""


@dataclass(frozen=True)
class Run:
    """What a training took."""

    steps: int
    cpu: float
    """Seconds of CPU time."""
    wall: float
    """Seconds of the clock."""
    loss: float
    """Mean over the last tenth of the steps."""


def train(model: nn.Module, parameters: Iterable[nn.Parameter], batches: Iterable[Batch], recipe: Recipe) -> Run:
    """Train these parameters, and no others, on the batches; the model is left in eval mode.

    `requires_grad` of the parameters is the caller's business, so that an adapter's frozen base stays as it is.
    """
    parameters = list(parameters)
    optimizer = _optimizer(parameters, recipe)
    set_mode(model, recipe.norm)
    losses: list[float] = []
    cpu, wall = time.process_time(), time.perf_counter()
    for step, (x, labels) in enumerate(islice(batches, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule((step + 1) / recipe.steps, recipe.warmup)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if time.process_time() - cpu > recipe.seconds:
            break
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return Run(len(losses), cpu, wall, sum(last) / len(last))


def set_mode(model: nn.Module, norm: Literal["train", "eval"]) -> None:
    """Training mode, except that BatchNorm keeps to its running statistics if `norm` is "eval"."""
    model.train()
    if norm == "eval":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@torch.no_grad()
def remeasure(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set BatchNorm's running statistics to the mean over these batches; nothing else changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    model.train()
    for x, _ in batches:
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, prepare: Prepare, batch: int = 250) -> float:
    """Share of right answers, in eval mode."""
    model.eval()
    right = 0
    for pixels, labels in zip(images.pixels.split(batch), images.labels.split(batch), strict=True):
        right += int((model(prepare(pixels)).argmax(1) == labels).sum())
    return right / len(images)


def batches(
    images: Images, prepare: Prepare, size: int, seed: int, augment: Callable[[Tensor, torch.Generator], Tensor] | None
) -> Iterator[Batch]:
    """Batches without end, each epoch in another order; every draw comes from the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // size * size].split(size):
            pixels = images.pixels[index]
            if augment:
                pixels = augment(pixels, generator)
            yield prepare(pixels), images.labels[index]


def flip_and_crop(pixels: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Mirror half of the images, and move each by up to `margin` pixels (He et al. 2015, §4.2)."""
    n, _, height, width = pixels.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    return shift(pixels, torch.randint(2 * margin + 1, (2, n), generator=generator), margin, (height, width))


def nudge(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel: for digits."""
    n, _, height, width = pixels.shape
    return shift(pixels, torch.randint(3, (2, n), generator=generator), 1, (height, width))


def shift(pixels: Tensor, offsets: Tensor, margin: int, size: tuple[int, int]) -> Tensor:
    """Crop each image, padded with zeros by `margin`, at its own offsets (2, n)."""
    padded = F.pad(pixels, (margin,) * 4)
    rows = offsets[0].view(-1, 1, 1) + torch.arange(size[0]).view(1, -1, 1)
    columns = offsets[1].view(-1, 1, 1) + torch.arange(size[1]).view(1, 1, -1)
    first = torch.arange(len(pixels)).view(-1, 1, 1)
    return padded[first, :, rows, columns].permute(0, 3, 1, 2)


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _schedule(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
