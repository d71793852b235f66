"""The over-sized digit classifier of the talk, and how it is trained and tested."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.digits.data import Digits

BATCH = 10


class DigitNet(nn.Module):
    """784 → 1000 → 2000 → 10 with ReLU between: 2,807,010 parameters, many more than digits need."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(784, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 784)."""
        x = F.relu(self.linear1(x))
        x = F.relu(self.linear2(x))
        return self.linear3(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Score:
    """How a network did on a split."""

    accuracy: float
    wrong: list[int]
    """Wrong answers for each digit, 0 to 9."""


def shuffled(split: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in batches of 10, in an order drawn from the generator."""
    for rows in torch.randperm(len(split), generator=generator).split(BATCH):
        yield split.images[rows], split.labels[rows]


def drawn(split: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: shuffled anew when the split is used up, each of `size` images."""
    while True:
        for rows in torch.randperm(len(split), generator=generator).split(size):
            if len(rows) == size or len(split) < size:
                yield split.images[rows], split.labels[rows]


def train(
    net: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    step: Callable[[], None],
    lr: float = 1e-3,
) -> None:
    """Adam on the cross-entropy, one step for each batch; calls `step` after each."""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    net.train()
    with _one_thread():
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step()
    net.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches of 10 are too small to share: a second thread gains nothing and, on a busy machine, waits at every step.

    It also makes the numbers the same whatever the count of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def predict(net: nn.Module, split: Digits) -> Tensor:
    """Logits (n, 10) for every image of a split."""
    return torch.cat([net(images) for images in split.images.split(2500)])


def score(logits: Tensor, split: Digits) -> Score:
    """Accuracy and errors per digit of these logits."""
    missed = split.labels[logits.argmax(1) != split.labels]
    return Score(1 - len(missed) / len(split), torch.bincount(missed, minlength=10).tolist())
