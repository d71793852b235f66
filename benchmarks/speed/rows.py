"""One adapter for each row of a batch."""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from benchmarks.speed.models import check_equal, llama, ours, output_of, theirs
from benchmarks.speed.timing import Arm, Result, interleaved

SIZES = ((8, 8), (32, 4), (32, 32), (64, 64))
"""Rows and adapters."""


def per_row(quick: bool = False) -> Iterator[Result]:
    """A batch whose rows have adapters of their own (r=8), through a Llama layer of 7 targets and d=512.

    The floor is the base alone: forward, or in training forward and backward with the input's gradient. PEFT takes
    `adapter_names=` in eval() only; there is no dropout here, so it is trained in eval(). Entering `per_row` counts.
    """
    base = llama(16, 1, 64) if quick else llama(512, 1, 64)
    for rows, adapters in ((3, 2),) if quick else SIZES:
        mine = ours(base, 8, names=[f"a{i}" for i in range(adapters)])
        peer = theirs(base, mine, 8)
        for model in (mine, peer):
            require_all(model)
        for tokens in (1, 2) if quick else (1, 64):
            x = base.get_input_embeddings()(torch.randint(0, 64, (rows, tokens))).detach()
            yield from row_cases(base, mine, peer, x, lambda model, x: output_of(model, inputs_embeds=x), quick=quick)


def require_all(model: nn.Module) -> None:
    """Train every adapter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)


def row_cases(
    base: nn.Module,
    mine: nn.Module,
    peer: Any,
    x: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor],
    *,
    limit: float = 1e-4,
    quick: bool = False,
    device: str = "cpu",
) -> Iterator[Result]:
    """Inference and training of one batch by all arms; x: (rows, tokens, ...)."""
    adapters = list(lk.adapters(mine))
    rows, tokens = x.shape[:2]
    names = list(islice(cycle(adapters), rows))

    def by_base(x: Tensor) -> Tensor:
        return run(base, x)

    def by_ours(x: Tensor) -> Tensor:
        with lk.per_row(mine, names):
            return run(mine, x)

    def by_theirs(x: Tensor) -> Tensor:
        with peer._enable_peft_forward_hooks(adapter_names=names):
            return run(peer.base_model.model, x)

    forwards = {"floor": by_base, "lorakit": by_ours, "peft": by_theirs}
    with torch.no_grad():
        check_equal(by_ours(x), by_theirs(x), limit=limit)
    what = f"{rows} rows, {len(adapters)} adapters, {tokens} {'token' if tokens == 1 else 'tokens'}"
    aim = 1.2 if len(adapters) <= 32 else 1.6
    arms: dict[str, Arm] = {name: lambda forward=forward: forward(x) for name, forward in forwards.items()}
    with torch.inference_mode():
        yield Result(f"{what}, inference", interleaved(arms, budget=1, quick=quick, device=device), aim=aim)
    leaf = x.clone().requires_grad_()
    gradient = torch.randn_like(by_base(leaf))
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in (("o", mine), ("t", peer))}
    gradients = []
    for forward, parameters in ((by_ours, trained["o"]), (by_theirs, trained["t"])):
        leaf.grad = None
        forward(leaf).backward(gradient)
        gradients.append([leaf.grad, *_by_adapter(parameters)])
    for one, other in zip(*gradients, strict=True):
        check_equal(one.float(), other.float(), limit=10 * limit)
    mine.zero_grad()
    peer.zero_grad()

    def training(forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Arm:
        def step() -> None:
            leaf.grad = None
            forward(leaf).backward(gradient)
            for parameter in parameters:
                parameter.grad = None

        return step

    arms = {
        "floor": training(by_base, []),
        "lorakit": training(by_ours, trained["o"]),
        "peft": training(by_theirs, trained["t"]),
    }
    yield Result(f"{what}, training", interleaved(arms, budget=1, quick=quick, device=device), aim=aim)


def _by_adapter(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The sizes of all gradients, in an order that does not depend on how the libraries nest them."""
    return [torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None]).sort().values]
