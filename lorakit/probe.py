"""Proof that an adapter acts: change each update in turn and watch the model's output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import Inputs, Strength, Term, Update
from lorakit.state import Site, check_complete, one_name, require, sites
from lorakit.switch import active
from lorakit.tables import table
from lorakit.untouched import spare_buffers, swapped

Effect = Literal["effective", "unreached", "bypassed"]


@dataclass(frozen=True)
class Probed:
    """What was seen at one adapted weight."""

    weight: str
    train: Effect
    eval: Effect

    @property
    def ok(self) -> bool:
        """Whether the update reached the output in both."""
        return self.train == self.eval == "effective"


@dataclass(frozen=True)
class ProbeReport:
    """What `probe` saw."""

    name: str
    weights: tuple[Probed, ...]

    @property
    def ok(self) -> bool:
        """Whether every update reached the output, in train and in eval mode."""
        return bool(self.weights) and all(row.ok for row in self.weights)

    def __str__(self) -> str:
        return f"{self.name}\n" + table(
            ["weight", "in train()", "in eval()"], [[row.weight, row.train, row.eval] for row in self.weights]
        )


def probe(model: nn.Module, *inputs: Any, name: str | None = None, **named_inputs: Any) -> ProbeReport:
    """Run the model on inputs in train and in eval mode, and say for each adapted weight whether its update acts.

    Each update in turn is replaced by noise. If the output changes it is "effective", if not "bypassed". If an update
    was never asked for, its weight is replaced: if the output changes, something reads it past the update, "bypassed";
    if not, its layer did not run, "unreached". One pass for each weight
    and mode, without gradients, so fused inference paths are tried as well. Weights, buffers, modes and random state
    are as before.

    Args:
        model: the model that was given to `attach`.
        *inputs: what the model is called with.
        name: the adapter; by default the only active one, or the only resident one.
        **named_inputs: keyword arguments of the call.

    Raises:
        LorakitError: no such adapter, or the model returns no tensor.
    """
    return probe_with(model, inputs, named_inputs, name)


@torch.no_grad()
def probe_with(
    model: nn.Module, inputs: Sequence[Any], named_inputs: Mapping[str, Any], name: str | None
) -> ProbeReport:
    """`probe` for a model whose forward has an argument that is called as one of `probe`'s own."""
    root, state = require(model, None if name is None else [name])
    if name is None and len(state.selection.active) == 1:
        name = state.selection.active[0][0]
    name = one_name(state, name)
    check_complete(root, state, name)
    where = sites(root, name)
    effects: dict[bool, list[Effect]] = {}
    with active(root, name), _modes_restored(root):
        for training in (True, False):
            root.train(training)
            effects[training] = _effects(root, lambda: model(*inputs, **named_inputs), where, name)
    rows = zip(where, effects[True], effects[False], strict=True)
    return ProbeReport(name, tuple(Probed(site.name, train, eval_) for site, train, eval_ in rows))


def _effects(root: nn.Module, run: Callable[[], Any], where: list[Site], name: str) -> list[Effect]:
    def output() -> list[Tensor]:
        devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
        with spare_buffers(root), torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)):
            torch.manual_seed(0)
            return [tensor.clone() for tensor in _tensors(run())]

    with ExitStack() as watching:
        spies = [watching.enter_context(_watched(site, name)) for site in where]
        before = output()
    if not before:
        raise LorakitError("the model returned no tensor to watch; probe a module that does")
    if not _same(before, output()):
        raise LorakitError(
            "nothing can be told: with the same inputs and the same torch seed, the model's output changes from run to "
            "run"
        )
    effects: list[Effect] = []
    for site, spy in zip(where, spies, strict=True):
        # Never asked: either the layer did not run, or something read its weight past the update.
        with _noise(site.adapted[name]) if spy.asked else _other_weight(site):
            silent = _same(before, output())
        effects.append(("bypassed" if silent else "effective") if spy.asked else "unreached" if silent else "bypassed")
    return effects


class _Spy(Update):
    """Stands in for an update and notes whether it was asked."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update
        self.kind, self.mode, self.enabled = update.kind, update.mode, update.enabled
        self.asked = False

    def delta_weight(self, weight: Tensor) -> Tensor:
        self.asked = True
        return self.update.delta_weight(weight)

    def beside(self, layer: nn.Module, inputs: Inputs, base: Tensor, y: Tensor, strength: Strength) -> Tensor:
        self.asked = True
        return self.update.beside(layer, inputs, base, y, strength)

    def term(self, strength: Strength) -> Term | None:
        self.asked = True
        return self.update.term(strength)


@contextmanager
def _watched(site: Site, name: str) -> Iterator[_Spy]:
    spy = _Spy(site.adapted[name])
    site.adapted.put(name, spy)
    try:
        yield spy
    finally:
        site.adapted.put(name, spy.update)


@contextmanager
def _other_weight(site: Site) -> Iterator[None]:
    """Noise in place of the base weight itself, if it is a plain parameter of floats."""
    weight = site.layer._parameters.get(site.parameter)
    if weight is None or not weight.dtype.is_floating_point or type(weight) is not nn.Parameter:
        yield
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    with swapped(site.layer._parameters, {site.parameter: nn.Parameter(noise, requires_grad=weight.requires_grad)}):
        yield


@contextmanager
def _noise(update: Update) -> Iterator[None]:
    """Standard normal noise in all the update's tensors; the values from before after it."""
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as aside:
        for module in update.modules():
            noise = {
                name: nn.Parameter(torch.randn(p.shape, generator=generator).to(p), requires_grad=False)
                for name, p in module._parameters.items()
                if p is not None
            }
            aside.enter_context(swapped(module._parameters, noise))
        yield


@contextmanager
def _modes_restored(root: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in root.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, however nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Equal to the bit, NaN being equal to NaN."""
    return len(before) == len(after) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(before, after, strict=True)
    )
