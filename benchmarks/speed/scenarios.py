"""Each scenario: the same work by several arms, the cheapest possible one among them as the floor."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit as lk
from benchmarks.speed.models import check_equal, linear, llama, ours, theirs
from benchmarks.speed.timing import Arm, Result, interleaved


def step(model: nn.Module, x: Tensor, gradient: Tensor) -> Arm:
    """Forward and backward, the gradient of the input included."""

    def run() -> None:
        x.grad = None
        model(x).backward(gradient)
        model.zero_grad()

    return run


def layer() -> Iterator[Result]:
    """One linear layer, forward and backward. The floor has LoRA's own arithmetic in it: 1 + 1.5·r·(1/d + 1/k)."""
    for n in (10, 512, 4096):
        for d in (784, 1024):
            for rank in (1, 8, 64):
                base = linear(d)
                mine = ours(base, rank)
                peer = theirs(base, mine, rank)
                talk = copy.deepcopy(base)
                update = lk.LowRankParametrization(talk[0].weight, lk.LoRA(rank=rank))
                nn.utils.parametrize.register_parametrization(talk[0], "weight", update)
                with torch.no_grad():
                    for tensor, value in zip(update.parameters(), lk.adapter_parameters(mine), strict=True):
                        tensor.copy_(value)
                x, gradient = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
                models = {"frozen": base, "lorakit": mine, "peft": peer, "parametrize": talk}
                check_equal(*(model(x) for name, model in models.items() if name != "frozen"))
                values = interleaved({name: step(model, x, gradient) for name, model in models.items()}, rounds=5)
                values["floor"] = values["frozen"] * (1 + 3 * rank / d)
                yield Result(f"n={n} d={d} r={rank}", values, "floor", 1.15 if n == 10 else 1.05)


def llama_step() -> Iterator[Result]:
    """A Llama of 28 targets, 512 tokens, r=8: a step with fused AdamW. The floor is the frozen forward and backward."""
    base = llama()
    mine = ours(base, 8)
    peer = theirs(base, mine, 8)
    full = copy.deepcopy(base).requires_grad_(True)
    tokens = torch.randint(0, 1024, (1, 512))
    check_equal(mine(tokens).logits, peer(tokens).logits)
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()

    def trains(model: nn.Module) -> Arm:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

        def run() -> None:
            embedded.grad = None
            model(inputs_embeds=embedded, labels=tokens).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return run

    arms = {"floor": trains(base), "lorakit": trains(mine), "peft": trains(peer), "full": trains(full)}
    yield Result("4 layers, d=512", interleaved(arms, rounds=7), "floor", 1.06)


def decode() -> Iterator[Result]:
    """One token through a model with an unmerged adapter, and through one layer."""
    with torch.inference_mode():
        for hidden in (64, 512):
            base = llama(hidden)
            mine = ours(base, 8)
            peer = theirs(base, mine, 8)
            token = torch.tensor([[5]])
            check_equal(mine(token).logits, peer(token).logits)
            models = {"floor": base, "lorakit": mine, "peft": peer}
            arms: dict[str, Arm] = {name: partial(model, token) for name, model in models.items()}
            yield Result(f"model, d={hidden}", interleaved(arms), "floor", 1.25)
        for d in (16, 512):
            base = linear(d)
            mine = ours(base, 8)
            peer = theirs(base, mine, 8)
            x = torch.randn(1, d)
            layers = {"floor": base[0], "lorakit": mine[0], "peft": peer.base_model.model[0]}
            arms = {name: partial(model, x) for name, model in layers.items()}
            yield Result(f"layer, d={d}", interleaved(arms), "floor", 1.5)


def switch() -> Iterator[Result]:
    """Choosing another of the resident adapters. The floor is a pointer write; the aim is against PEFT: 1/500."""
    base = llama(64)
    for residents in (1, 8, 64):
        mine = ours(base, 8)
        peer = theirs(base, mine, 8)
        names = ["default"]
        for i in range(residents):
            lk.attach(mine, lk.LoRA(rank=8), lk.adapters(mine)["default"].weights, mode="auto", name=f"a{i}")
            peer.add_adapter(f"a{i}", peer.peft_config["default"])
            names.append(f"a{i}")
        turn = {"ours": 0, "theirs": 0}

        def next_of(who: str, choose: Callable[[str], None], turn=turn, names=names) -> Arm:
            def run() -> None:
                turn[who] = (turn[who] + 1) % len(names)
                choose(names[turn[who]])

            return run

        arms = {
            "lorakit": next_of("ours", lambda name, mine=mine: lk.activate(mine, name)),
            "peft": next_of("theirs", lambda name, peer=peer: peer.set_adapter(name)),
        }
        yield Result(f"{residents} resident, 28 targets", interleaved(arms, rounds=5), "peft", 1 / 500)


def load() -> Iterator[Result]:
    """An adapter from disk, the first and the 64th. The floor is reading the file."""
    base = llama(256)
    mine = ours(base, 8)
    with tempfile.TemporaryDirectory() as folder:
        lk.save(mine, folder)
        lk.detach(mine)
        file = str(Path(folder) / "adapter_model.safetensors")
        for residents in (0, 63):
            model = copy.deepcopy(base)
            for i in range(residents):
                lk.load(model, folder, name=f"r{i}", verify="off")
            count = [0]

            def run(model: nn.Module = model, count: list[int] = count) -> None:
                count[0] += 1
                lk.load(model, folder, name=f"n{count[0]}")
                lk.remove(model, f"n{count[0]}")

            values = interleaved({"floor": lambda: load_file(file), "lorakit, and removed again": run}, rounds=5)
            values["lorakit"] = values.pop("lorakit, and removed again")
            yield Result(f"number {residents + 1}, loaded and removed", values, "floor", 2.0)


def merging() -> Iterator[Result]:
    """Merging and restoring. The floor is a copy of the weights."""
    base = llama(512)
    mine = ours(base, 8)
    peer = theirs(base, mine, 8)
    weights = [mine.get_parameter(name) for name in lk.adapters(mine)["default"].weights]

    def copies() -> None:
        for weight in weights:
            weight.detach().clone()

    def with_ours() -> None:
        with lk.merged(mine):
            pass

    def with_theirs() -> None:
        peer.merge_adapter()
        peer.unmerge_adapter()

    values = interleaved({"floor": copies, "lorakit": with_ours, "peft": with_theirs}, rounds=5)
    yield Result("28 targets, d=512", values, "floor", 2.2)


def attaching() -> Iterator[Result]:
    """Attaching and detaching. The floor is making the tensors."""
    base = llama(64, layers=16)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    shapes = [base.get_submodule(name).weight.shape for name in names]

    def tensors() -> None:
        for d, k in shapes:
            nn.init.kaiming_uniform_(nn.Parameter(torch.empty(8, k)))
            nn.Parameter(torch.zeros(d, 8))

    def with_ours() -> None:
        lk.attach(base, lk.LoRA(rank=8), exclude="lm_head")
        lk.detach(base)

    yield Result(f"{len(names)} targets", interleaved({"floor": tensors, "lorakit": with_ours}, rounds=5), "floor", 1.5)


def dora() -> Iterator[Result]:
    """A DoRA step beside a LoRA step."""
    for d in (256, 1024):
        base = linear(d)
        x, gradient = torch.randn(512, d, requires_grad=True), torch.randn(512, d)
        arms = {
            "floor": step(ours(base, 8), x, gradient),
            "lorakit": step(ours(base, 8, variant=lk.DoRA(rank=8)), x, gradient),
        }
        yield Result(f"n=512 d={d} r=8", interleaved(arms), "floor", 1.25)


SCENARIOS: dict[str, Callable[[], Iterator[Result]]] = {
    "layer": layer,
    "llama": llama_step,
    "decode": decode,
    "switch": switch,
    "load": load,
    "merge": merging,
    "attach": attaching,
    "dora": dora,
}
