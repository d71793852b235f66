"""Compiled models."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lorakit as lk
from benchmarks.speed.models import check_equal, linear, llama, ours, theirs
from benchmarks.speed.steps import with_optimizer
from benchmarks.speed.timing import Arm, Result, interleaved

SWITCHES = 32


def compiled(quick: bool = False) -> Iterator[Result]:
    """`torch.compile(fullgraph=True)` of an adapted Llama (14 targets, d=256, 128 tokens, r=8), by inductor.

    The floor is the frozen model, compiled likewise: its forward, or the forward and the input's gradient beside a step
    with AdamW. Then the number of graphs that are compiled over 32 switches: one that serves all is the floor.
    """
    base = llama(16, 1) if quick else llama(256, 2)
    tokens = torch.randint(0, 1024, (1, 4 if quick else 128))
    mine = ours(base, 8)
    models = {"floor": base, "lorakit": mine, "peft": theirs(base, mine, 8)}
    backend = "eager" if quick else "inductor"
    torch._dynamo.reset()
    fast = {name: torch.compile(model, fullgraph=True, backend=backend) for name, model in models.items()}
    with torch.no_grad():
        check_equal(*(fast[name](tokens).logits for name in ("lorakit", "peft")), mine(tokens).logits, limit=1e-3)
        arms: dict[str, Arm] = {name: partial(model, tokens) for name, model in fast.items()}
        yield Result("forward", interleaved(arms, quick=quick))
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        embedded.grad = None
        return model(inputs_embeds=embedded).logits.square().mean()

    arms = {name: with_optimizer(model, torch.optim.AdamW, loss) for name, model in fast.items()}
    yield Result("step", interleaved(arms, quick=quick))
    switches = 4 if quick else SWITCHES
    for residents in (2, switches):
        graphs = {name: graphs_of(name, residents, switches) for name in ("lorakit", "peft")}
        yield Result(f"{switches} switches among {residents}", {"floor": 1.0, **graphs}, unit="graphs")
    torch._dynamo.reset()


def graphs_of(library: str, residents: int, switches: int) -> float:
    """How many graphs are compiled over the switches, with torch's limit of eight lifted, and each output checked."""
    base = linear(8)
    names = [f"a{i}" for i in range(residents)]
    mine = ours(base, 2, names=names)
    peer = theirs(base, mine, 2)
    model = mine if library == "lorakit" else peer
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter)
    x = torch.randn(3, 8)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2 * SWITCHES, accumulated_recompile_limit=10**4):
        for i in range(switches):
            name = names[i % residents]
            lk.activate(mine, name)
            peer.set_adapter(name)
            check_equal(fast(x), mine(x), peer(x))
    return float(counter.frame_count)
