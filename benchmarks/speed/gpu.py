"""The scenarios that are about a GPU: bfloat16, large layers, a Llama of 1B parameters. Smaller ones test the code."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.speed import layer as one_layer
from benchmarks.speed.models import check_steps, linear, llama, ours, theirs
from benchmarks.speed.rows import SIZES, require_all, row_cases
from benchmarks.speed.steps import with_optimizer
from benchmarks.speed.timing import Result, interleaved

BF16 = torch.bfloat16


def layer(quick: bool = False, device: str = "cuda") -> Iterator[Result]:
    """One linear layer in bfloat16 with factors in float32: forward and backward with the gradient of its input."""
    for n in (8,) if quick else (512, 4096):
        for d in (32,) if quick else (4096, 8192):
            for rank in (2,) if quick else (8, 64):
                yield one_layer.layer_case(n, d, rank, 1.05, BF16, device, quick)


def llama_step(quick: bool = False, device: str = "cuda") -> Iterator[Result]:
    """A step of a random Llama of 1.1B parameters in bfloat16 (22 layers, d=2048) with fused AdamW, r=16.

    The floor is the frozen forward and the input's gradient. Tokens a second, and the peak of memory.
    """
    if quick:
        base, tokens = llama(32, 1, 64), 8
    else:
        with torch.device(device):
            base, tokens = llama(2048, 22, 32000, heads=32, tokens=2048), 2048
    base = base.to(device, BF16)
    mine = ours(base, 16)
    models = {"floor": base, "lorakit": mine, "peft": theirs(base, mine, 16)}
    inputs = torch.randint(0, 64, (1, tokens), device=device)
    embedded = base.get_input_embeddings()(inputs).detach().requires_grad_()
    check_steps({name: models[name] for name in ("lorakit", "peft")}, embedded, limit=0.1, inputs_embeds=embedded)

    def loss(model: nn.Module) -> Tensor:
        embedded.grad = None
        return model(inputs_embeds=embedded, labels=inputs).loss

    arms = {name: with_optimizer(model, torch.optim.AdamW, loss) for name, model in models.items()}
    values = interleaved(arms, quick=quick, device=device)
    speeds = {f"{name}, tokens/s": tokens / seconds for name, seconds in values.items()}
    yield Result(f"step, {tokens} tokens", values, aim=1.06, notes=speeds)
    if device == "cpu":
        return
    peaks = {}
    for name, arm in arms.items():
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        arm()
        torch.cuda.synchronize()
        peaks[name] = float(torch.cuda.max_memory_allocated() - begin)
    yield Result("peak of memory in a step, above what was there", peaks, aim=1.1, unit="bytes")


def per_row(quick: bool = False, device: str = "cuda") -> Iterator[Result]:
    """A batch whose rows have adapters of their own (r=16), through 4 linear layers in bfloat16."""
    for d in (32,) if quick else (4096, 8192):
        for rows, adapters in ((3, 2),) if quick else SIZES:
            base = linear(d, layers=2 if quick else 4).to(device, BF16).eval()
            mine = ours(base, 16, names=[f"a{i}" for i in range(adapters)])
            peer = theirs(base, mine, 16)
            for model in (mine, peer):
                require_all(model)
            for tokens in (1, 2) if quick else (1, 64):
                x = torch.randn(rows, tokens, d, device=device, dtype=BF16)
                for result in row_cases(base, mine, peer, x, _call, limit=0.05, quick=quick, device=device):
                    yield Result(f"d={d}, {result.case}", result.values, aim=result.aim)


def _call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def bytes_kept(quick: bool = False, device: str = "cuda") -> Iterator[Result]:
    """Bytes that one layer keeps for backward, as without a GPU, of large layers."""
    for d in (16,) if quick else (4096, 8192):
        yield from one_layer.bytes_kept(quick, device, n=2048, d=d, rank=16)
