"""What the verbs themselves take: switching, loading, attaching."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from benchmarks.speed.models import check_equal, like_llama, linear, llama, ours, peft, targets_of, theirs, without_head
from benchmarks.speed.timing import Apart, Arm, Result, interleaved


def switch(quick: bool = False) -> Iterator[Result]:
    """Choosing another of the resident adapters, each in its turn.

    The aim is a 500th of PEFT's `set_adapter`, and the same time whatever the number of residents and layers. The last
    cases have the smallest model, or the fewest residents, as their floor.
    """
    layers = (2, 4) if quick else (28, 112, 224)
    residents = (1, 2) if quick else (1, 8, 64)
    constant: dict[str, Arm] = {}
    for count in layers:
        base = linear(16, layers=count)
        choose, values = _switch_case(base, ["a", "b"], quick)
        constant[f"{count} layers"] = choose
        yield Result(f"2 resident, {count} layers", values, "peft", against={"peft": 1 / 500})
    for number in residents:
        base = linear(16, layers=layers[0])
        choose, values = _switch_case(base, [f"a{i}" for i in range(number)], quick)
        constant[f"{number} resident"] = choose
        yield Result(f"{number} resident, {layers[0]} layers", values, "peft", against={"peft": 1 / 500})
    values = interleaved(constant, quick=quick)
    for few, many in ((f"{layers[0]} layers", f"{layers[-1]} layers"), ("1 resident", f"{residents[-1]} resident")):
        yield Result(f"{many} against {few}", {"floor": values[few], "lorakit": values[many]}, aim=1.2)


def _switch_case(base: nn.Module, names: Sequence[str], quick: bool) -> tuple[Arm, dict[str, float]]:
    """Lorakit's arm, and what it and PEFT take."""
    mine = ours(base, 8, names=names)
    peer = theirs(base, mine, 8)
    x = torch.randn(2, 16)
    for name in names[:2]:
        lk.activate(mine, name)
        peer.set_adapter(name)
        check_equal(mine(x), peer(x))

    def turns(choose: Callable[[str], None]) -> Arm:
        each = cycle(names)
        return lambda: choose(next(each))

    def activate(name: str) -> None:
        lk.activate(mine, name)

    arm = turns(activate)
    return arm, interleaved({"lorakit": arm, "peft": turns(peer.set_adapter)}, budget=1, quick=quick)


def load(quick: bool = False) -> Iterator[Result]:
    """An adapter from disk, the first and the 64th. It is removed again, which is not timed.

    The floor is safetensors' `load_file` of the same file, which is in the system's cache.
    """
    base = llama(16, 1) if quick else llama(256)
    mine = ours(base, 8)
    token = torch.tensor([[5]])
    wanted = mine(token).logits
    with tempfile.TemporaryDirectory() as folder:
        lk.save(mine, folder)
        file = str(Path(folder) / "adapter_model.safetensors")
        for others in (0, 1) if quick else (0, 63):
            model = copy.deepcopy(base)
            for i in range(others):
                lk.load(model, folder, name=f"r{i}")
            # PEFT's model begins with one adapter at least: that is the first of the others
            peer = theirs(base, mine, 8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for i in range(1, others):
                    peer.load_adapter(folder, f"r{i}")
                arms = {
                    "floor": lambda: load_file(file),
                    "lorakit": Apart(
                        lambda _, model=model: lk.load(model, folder, name="new"),
                        after=lambda _, model=model: lk.remove(model, "new"),
                    ),
                    "peft": Apart(
                        lambda _, peer=peer: peer.load_adapter(folder, "new"),
                        after=lambda _, peer=peer: _remove(peer),
                    ),
                }
                lk.load(model, folder, name="check")
                peer.load_adapter(folder, "check")
                peer.set_adapter("check")
                check_equal(wanted, model(token).logits, peer(token).logits)
                lk.remove(model, "check")
                _remove(peer, "check")
                yield Result(f"number {others + 1}, 28 targets", interleaved(arms, quick=quick), aim=2.0)


def _remove(peer: nn.Module, name: str = "new") -> None:
    peer.set_adapter("default")
    peer.delete_adapter(name)


def attach(quick: bool = False) -> Iterator[Result]:
    """Attaching LoRA of rank 8 to the layers of a Llama: as large as 7B's on `meta`, and a small one with values.

    The floor is making the tensors: kaiming's A and B = 0. The copy that each is attached to is made apart.
    """
    count = 2 if quick else 32
    shapes = {"7B's shape on meta": (4096, 11008, "meta"), "d=64": (64, 176, "cpu")}
    for case, (hidden, intermediate, device) in shapes.items():
        base = like_llama(count, hidden, intermediate, device)
        targets = targets_of(_attached(copy.deepcopy(base)))
        sizes = [base.get_submodule(name).weight.shape for name in targets]
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets)

        def tensors(sizes: list[torch.Size] = sizes, device: str = device) -> None:
            for d, k in sizes:
                nn.init.kaiming_uniform_(nn.Parameter(torch.empty(8, k, device=device)))
                nn.Parameter(torch.zeros(d, 8, device=device))

        def inject(model: Any, config: Any = config, device: str = device) -> None:
            peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=device == "meta")

        def fresh(base: nn.Module = base) -> nn.Module:
            return copy.deepcopy(base)

        _check_alike(fresh(), config, device)
        arms: dict[str, Arm] = {"floor": tensors, "lorakit": Apart(_attached, fresh), "peft": Apart(inject, fresh)}
        yield Result(f"{len(targets)} layers, {case}", interleaved(arms, quick=quick), aim=1.5)


def _attached(model: nn.Module) -> nn.Module:
    lk.attach(model, lk.LoRA(rank=8), exclude=without_head(model))
    return model


def _check_alike(model: nn.Module, config: Any, device: str) -> None:
    """Both make tensors of the same shapes and on the same device."""
    other = copy.deepcopy(model)
    _attached(model)
    peft.inject_adapter_in_model(config, other, low_cpu_mem_usage=device == "meta")
    made = [
        [(p.shape, p.device.type, p.dtype) for p in each.parameters() if p.requires_grad] for each in (model, other)
    ]
    if made[0] != made[1]:
        raise AssertionError("lorakit and PEFT make other tensors")
