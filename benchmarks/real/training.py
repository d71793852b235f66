"""One training loop for every arm of every comparison, and the accuracy it is judged by."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.data import Images

Batch = tuple[Tensor, Tensor]
Prepare = Callable[[Tensor], Tensor]
"""uint8 pixels → what the network takes."""


@dataclass(frozen=True)
class Recipe:
    """How to train. It ends with the steps or with the seconds, whichever is used up first.

    The same seed and steps give the same result to the bit. Seconds are the fair budget between arms whose steps cost
    differently, but how many steps they hold depends on the machine.
    """

    lr: float
    steps: float = math.inf
    seconds: float = math.inf
    """CPU time, of this process alone."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.05
    """Share of the budget during which the learning rate rises; after it, it falls to zero along half a cosine."""
    norm: Literal["train", "eval"] = "eval"
    """BatchNorm by the statistics of the batch, which also moves the running ones, or by the running ones."""


@dataclass(frozen=True)
class Run:
    """What a training took."""

    steps: int
    cpu: float
    """Seconds of CPU time."""
    wall: float
    """Seconds of the clock."""
    losses: list[float]
    """One for each step."""


Loss = Callable[[nn.Module, Any], Tensor]
"""The model and a batch → what is to become small."""


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of logits (n, classes) with labels (n,)."""
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Any],
    recipe: Recipe,
    loss_of: Loss = classification,
) -> Run:
    """Train these parameters, and no others, on the batches; the model is left in eval mode.

    `requires_grad` of the parameters is the caller's business, so that an adapter's frozen base stays as it is.
    """
    if math.isinf(recipe.steps) and math.isinf(recipe.seconds):
        raise ValueError("a recipe without an end: give it steps or seconds")
    optimizer = _optimizer(list(parameters), recipe)
    set_mode(model, recipe.norm)
    losses: list[float] = []
    endless = iter(batches)
    first = next(endless)  # before the clock starts: reading the data is not the arm's work
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in chain([first], endless):
        used = max((len(losses) + 1) / recipe.steps, (time.process_time() - cpu) / recipe.seconds)
        if used > 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(used, recipe.warmup)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    model.eval()
    return Run(len(losses), cpu, wall, losses)


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
