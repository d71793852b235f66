"""Inference: one token beside an adapter that is not merged, and a model after merging."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import lorakit as lk
from benchmarks.speed.models import check_equal, linear, llama, ours, theirs
from benchmarks.speed.timing import Arm, Result, interleaved


def decode(quick: bool = False) -> Iterator[Result]:
    """One token through a model with an adapter that is not merged (r=8), and one row through a layer.

    The floor is the bare model. At d=16 a layer is little but dispatch.
    """
    with torch.inference_mode():
        for hidden in (16,) if quick else (64, 512):
            base = llama(hidden, 1 if quick else 4)
            mine = ours(base, 8)
            peer = theirs(base, mine, 8)
            token = torch.tensor([[5]])
            check_equal(mine(token).logits, peer(token).logits)
            models = {"floor": base, "lorakit": mine, "peft": peer}
            arms: dict[str, Arm] = {name: partial(model, token) for name, model in models.items()}
            yield Result(f"model of {1 if quick else 28} targets, d={hidden}", interleaved(arms, quick=quick), aim=1.25)
    for name, mode in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
        base = linear(16)
        mine = ours(base, 8)
        peer = theirs(base, mine, 8)
        x = torch.randn(1, 16)
        with mode():
            check_equal(mine(x), peer(x))
            layers = {"floor": base[0], "lorakit": mine[0], "peft": peer.base_model.model[0]}
            arms = {name: partial(layer, x) for name, layer in layers.items()}
            yield Result(f"layer, d=16, {name}", interleaved(arms, budget=3, quick=quick), aim=1.5)


def merged(quick: bool = False) -> Iterator[Result]:
    """One token through the bare model and through one into which an adapter was merged.

    Before it is timed, the module tree is compared with the bare one: nothing of the library may be in it. The aim
    is 1; two per cent are left to the clock.
    """
    base = llama(16, 1) if quick else llama(64)
    for_good = ours(base, 8)
    adapted = copy.deepcopy(for_good)
    token = torch.tensor([[5]])
    with torch.inference_mode():
        wanted = adapted(token).logits
        lk.merge(for_good)
        with lk.merged(adapted):
            for model in (for_good, adapted):
                check_nothing_left(base, model)
                check_equal(wanted, model(token).logits)
            models = {"floor": base, "lorakit": for_good, "inside lk.merged": adapted}
            arms: dict[str, Arm] = {name: partial(model, token) for name, model in models.items()}
            values = interleaved(arms, budget=4, quick=quick)
    names = {"lorakit": "after lk.merge", "inside lk.merged": "inside lk.merged"}
    for arm, case in names.items():
        yield Result(case, {"floor": values["floor"], "lorakit": values[arm]}, aim=1.02)


def check_nothing_left(bare: nn.Module, model: nn.Module) -> None:
    """The module trees are alike: the same classes, attributes and hooks, and no object of the library."""
    trees = [dict(each.named_modules()) for each in (bare, model)]
    if list(trees[0]) != list(trees[1]):
        raise AssertionError(f"there are other modules: {set(trees[0]) ^ set(trees[1])}")
    for name, module in trees[1].items():
        like = trees[0][name]
        if type(module) is not type(like) or list(vars(module)) != list(vars(like)):
            raise AssertionError(f"{name!r} is not as it was: {type(module)}, {set(vars(module)) ^ set(vars(like))}")
        for attribute, value in vars(module).items():
            before = vars(like)[attribute]
            if type(value) is not type(before) or _ours(value):
                raise AssertionError(f"{name}.{attribute} is {type(value)}")
            if isinstance(value, dict) and list(value) != list(before):
                raise AssertionError(f"{name}.{attribute} holds {list(value)}, not {list(before)}")


def _ours(value: Any) -> bool:
    """Whether it, or something in it, was made by the library."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    modules = [getattr(each, "__module__", None) or type(each).__module__ for each in (value, *inside)]
    return any(module.startswith("lorakit") for module in modules)
