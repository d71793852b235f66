"""One linear layer: the time of a step, and what it keeps for backward."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import lorakit as lk
from benchmarks.speed.models import by_loralib, by_talk, check_steps, full, linear, ours, theirs
from benchmarks.speed.timing import Arm, Result, interleaved


def step(model: nn.Module, x: Tensor, gradient: Tensor) -> Arm:
    """Forward and backward, the gradient of the input included."""

    def run() -> None:
        x.grad = None
        model(x).backward(gradient)
        model.zero_grad()

    return run


def layer(quick: bool = False) -> Iterator[Result]:
    """One linear layer, forward and backward with the gradient of its input.

    The floor is the frozen layer with LoRA's own arithmetic added: times 1 + 1.5·r·(1/d + 1/k).
    """
    for n in (10,) if quick else (10, 512, 4096):
        for d in (16,) if quick else (784, 1024):
            for rank in (2,) if quick else (1, 8, 64):
                yield layer_case(n, d, rank, 1.15 if n == 10 else 1.05, quick=quick)


def layer_case(
    n: int,
    d: int,
    rank: int,
    aim: float,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quick: bool = False,
) -> Result:
    """A step of one square layer by all arms."""
    base = linear(d).to(device, dtype)
    mine = ours(base, rank)
    adapted = {"lorakit": mine, "peft": theirs(base, mine, rank)}
    if dtype == torch.float32:  # the other two have factors in the weight's own dtype
        adapted |= {"parametrize": by_talk(base, mine), "loralib": by_loralib(base, mine)}
    x = torch.randn(n, d, dtype=dtype, device=device, requires_grad=True)
    check_steps(adapted, x, limit=1e-4 if dtype == torch.float32 else 2e-2)
    gradient = torch.randn(n, d, dtype=dtype, device=device)
    models = {"frozen": base, **adapted, "full": full(base)}
    arms = {name: step(model, x, gradient) for name, model in models.items()}
    values = interleaved(arms, budget=3 if n == 10 else 1.5, quick=quick, device=device)
    values = {"floor": values["frozen"] * (1 + 3 * rank / d), **values}
    return Result(f"n={n} d={d} r={rank}", values, "floor", aim)


def kept(model: nn.Module, x: Tensor) -> float:
    """Bytes that a forward keeps for backward, but for the model's own tensors: each storage once, and whole."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its address could be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return float(sum(sizes.values()))


def bytes_kept(quick: bool = False, device: str = "cpu", n: int = 512, d: int = 512, rank: int = 8) -> Iterator[Result]:
    """Bytes that one layer keeps for backward, counted and not timed. All of its input's gradients are asked for.

    The floor is the input once, in its own dtype, and the n·r numbers between the factors in float32. LoRA-FA does not
    train A, and needs the second alone. Dropout's mask follows from a seed, so the floor has none.
    """
    if quick:
        n, d, rank = 4, 16, 2
    cases: list[tuple[str, torch.dtype, lk.LoRA | lk.LoRAFA]] = [
        ("float32", torch.float32, lk.LoRA(rank=rank)),
        ("dropout 0.1", torch.float32, lk.LoRA(rank=rank, dropout=0.1)),
        ("bfloat16 base", torch.bfloat16, lk.LoRA(rank=rank)),
        ("bfloat16 base, dropout 0.1", torch.bfloat16, lk.LoRA(rank=rank, dropout=0.1)),
        ("LoRA-FA", torch.float32, lk.LoRAFA(rank=rank)),
        ("LoRA-FA, bfloat16 base", torch.bfloat16, lk.LoRAFA(rank=rank)),
    ]
    for case, dtype, variant in cases:
        base = linear(d).to(device, dtype)
        mine = ours(base, rank, variant=variant).train()
        models = {"lorakit": mine}
        models["peft"] = theirs(base, mine, rank, lora_dropout=variant.dropout).train()
        if isinstance(variant, lk.LoRAFA):  # PEFT has it as an optimizer that is made so
            models["peft"].base_model.model[0].lora_A.requires_grad_(False)
        else:
            if not variant.dropout:
                if dtype == torch.float32:
                    check_steps(
                        {**models, "parametrize": by_talk(base, mine)},
                        torch.randn(n, d, device=device).requires_grad_(),
                    )
                models["parametrize"] = by_talk(base, mine)
            if dtype == torch.float32:
                models["loralib"] = by_loralib(base, mine)
                models["loralib"][0].lora_dropout = nn.Dropout(variant.dropout)
        x = torch.randn(n, d, dtype=dtype, device=device, requires_grad=True)
        trains_A = isinstance(variant, lk.LoRA)
        values = {"floor": float(n * rank * 4 + trains_A * n * d * dtype.itemsize)}
        values |= {name: kept(model, x) for name, model in models.items()}
        yield Result(f"{case}, n={n} d={d} r={rank}", values, "floor", 1.0, unit="bytes")
