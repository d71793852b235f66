"""Whole training steps: the digits network, Llamas, and DoRA."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from benchmarks.speed.layer import step
from benchmarks.speed.models import by_talk, check_equal, check_steps, full, linear, llama, ours, theirs, trained
from benchmarks.speed.timing import Arm, Result, interleaved
from lorakit.digits.network import BATCH, DigitNet


def with_optimizer(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], loss: Callable[[nn.Module], Tensor]
) -> Arm:
    """A step; of a model that trains nothing, forward and backward alone."""
    parameters = trained(model)
    optimizer = make(parameters, lr=1e-5, fused=True) if parameters else None

    def run() -> None:
        loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def digits(quick: bool = False) -> Iterator[Result]:
    """A step of the digits network 784-1000-2000-10 with fused Adam, as `lorakit digits` takes it: batch 10, rank 1.

    The floor is the frozen network's forward and the gradient of the images, which training needs not.
    """
    torch.manual_seed(0)
    base: nn.Module = DigitNet().requires_grad_(False)
    if quick:
        base = linear(10)
    x = torch.randn(BATCH, 10 if quick else 784)
    labels = torch.randint(0, 10, (BATCH,))
    mine = ours(base, 1)
    models = {"lorakit": mine, "parametrize": by_talk(base, mine), "peft": theirs(base, mine, 1)}
    check_steps(models, x)
    models["full"] = full(base)
    arms = {
        name: with_optimizer(model, torch.optim.Adam, lambda model: F.cross_entropy(model(x), labels))
        for name, model in models.items()
    }
    leaf = x.clone().requires_grad_()

    def frozen() -> None:
        leaf.grad = None
        F.cross_entropy(base(leaf), labels).backward()

    values = interleaved({"floor": frozen, **arms}, quick=quick)
    yield Result("batch 10, r=1", values, against={"parametrize": 0.25, "full": 1.0})


def llama_step(quick: bool = False) -> Iterator[Result]:
    """A step of a Llama with fused AdamW, 512 tokens, r=8. The floor is the frozen forward and the input's gradient."""
    if quick:
        yield llama_case(16, 1, tokens=8, quick=True)
    else:
        yield llama_case(256, 16)
        yield llama_case(512, 12)


def llama_models(hidden: int, layers: int, rank: int = 8, **how: int) -> dict[str, nn.Module]:
    """The frozen model, and copies of it by each library."""
    base = llama(hidden, layers, **how)
    mine = ours(base, rank)
    return {"floor": base, "lorakit": mine, "peft": theirs(base, mine, rank), "full": full(base)}


def llama_case(hidden: int, layers: int, tokens: int = 512, quick: bool = False) -> Result:
    """A step by all arms."""
    models = llama_models(hidden, layers)
    inputs = torch.randint(0, 1024, (1, tokens))
    embedded = models["floor"].get_input_embeddings()(inputs).detach().requires_grad_()
    adapted = {name: models[name] for name in ("lorakit", "peft")}
    check_steps(adapted, embedded, limit=1e-3, inputs_embeds=embedded)

    def loss(model: nn.Module) -> Tensor:
        embedded.grad = None
        return model(inputs_embeds=embedded, labels=inputs).loss

    arms = {name: with_optimizer(model, torch.optim.AdamW, loss) for name, model in models.items()}
    case = f"{7 * layers} targets, d={hidden}"
    return Result(case, interleaved(arms, quick=quick), aim=1.06, against={"peft": 1.0, "full": 1.0})


def dora(quick: bool = False) -> Iterator[Result]:
    """A DoRA step; the floor is the LoRA step of lorakit. n=512 (the Llama: 512 tokens), r=8."""
    for d in (16,) if quick else (256, 512, 1024):
        base = linear(d)
        models = dora_models(base)
        x = torch.randn(8 if quick else 512, d, requires_grad=True)
        check_steps({name: models[name] for name in ("lorakit", "peft")}, x)
        gradient = torch.randn_like(x)
        arms = {name: step(model, x, gradient) for name, model in models.items()}
        yield Result(f"layer d={d}", interleaved(arms, quick=quick), aim=1.25)
    base = llama(16, 1) if quick else llama(256, 4)
    models = dora_models(base)
    tokens = torch.randint(0, 1024, (1, 8 if quick else 512))
    check_equal(models["lorakit"](tokens).logits, models["peft"](tokens).logits, limit=1e-3)
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        embedded.grad = None
        return model(inputs_embeds=embedded, labels=tokens).loss

    arms = {name: with_optimizer(model, torch.optim.AdamW, loss) for name, model in models.items()}
    yield Result("Llama, 28 targets, d=256, with AdamW", interleaved(arms, quick=quick), aim=1.25)


def dora_models(base: nn.Module) -> dict[str, nn.Module]:
    """LoRA by lorakit, DoRA by both, with the same factors and magnitudes."""
    mine = ours(base, 8, variant=lk.DoRA(rank=8))
    peer = theirs(base, mine, 8, use_dora=True)
    return {"floor": ours(base, 8), "lorakit": mine, "peft": peer}
