"""What a start from data is computed from: the inputs of layers, gradients of their weights, or the true weights.

The base runs alone, without any adapter. Weights, buffers, gradients and modes are as before after it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers import base_weight
from lorakit.plan import Choice
from lorakit.state import find_root
from lorakit.switch import disabled
from lorakit.targets import Place
from lorakit.untouched import spare_buffers
from lorakit.variants import Evidence

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Sources:
    """What `attach` was given to compute a start from."""

    model: nn.Module
    data: Iterable[Any] | None
    """Batches: what the model is called with (a mapping by name, a tuple or list in order), or what `loss` takes."""
    loss: Loss | None
    original: nn.Module | None


def gather(sources: Sources, choices: Sequence[Choice]) -> list[Tensor | None]:
    """What each place's variant needs, in their order.

    Raises:
        LorakitError: it was not given, is empty, not finite, or does not reach a layer.
    """
    needed = {choice.variant.needs for choice in choices}
    given = {"data": sources.data, "loss": sources.loss, "original": sources.original}
    uses = {"data": {"inputs", "gradients"}, "loss": {"inputs", "gradients"}, "original": {"original"}}
    for name, value in given.items():
        if value is not None and not uses[name] & needed:
            raise LorakitError(f"{name}= has no use here: no weight's start is computed from it; leave it out")
    wanted: dict[Evidence, list[Place]] = {}
    for place, variant, _ in choices:
        if variant.needs is not None:
            wanted.setdefault(variant.needs, []).append(place)
    gathered: dict[int, Tensor] = {}
    for kind, places in wanted.items():
        ranks = [variant.rank for _, variant, _ in choices if variant.needs == kind]  # type: ignore[attr-defined]
        for place, tensor in zip(places, _GATHER[kind](sources, places, ranks), strict=True):
            if not tensor.isfinite().all():
                raise LorakitError(
                    f"at {place.label!r}: the data gives NaN or infinity there; nothing can start from it"
                )
            gathered[id(place)] = tensor
    return [gathered.get(id(choice.place)) for choice in choices]


def _inputs(sources: Sources, places: list[Place], ranks: list[int]) -> list[Tensor]:
    """The principal directions of each layer's centred inputs, (rank, k), by decreasing variance."""
    found = [_Principal(place, rank) for place, rank in zip(places, ranks, strict=True)]

    def note(principal: _Principal) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            principal.add((args or tuple(kwargs.values()))[0])

        return hook

    with ExitStack() as hooked, torch.no_grad():
        hooked.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code looks for no new hooks
        for place, principal in zip(places, found, strict=True):
            handle = place.layer.register_forward_pre_hook(note(principal), with_kwargs=True)
            hooked.callback(handle.remove)
        for batch in _batches(sources, "init='eva'"):
            _run(sources, batch)
    return [principal.directions() for principal in found]


class _Principal:
    """The principal directions of vectors that come in batches.

    What is kept of the batches before is their mean and their largest directions (Ross et al. 2008, "Incremental
    learning for robust visual tracking", §2.2).
    """

    def __init__(self, place: Place, rank: int) -> None:
        self.place = place
        self.rank = rank
        self.count = 0
        self.mean: Any = 0.0
        self.kept: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not len(x):
            return
        if not x.isfinite().all():
            raise LorakitError(f"at {self.place.label!r}: its inputs hold NaN or infinity on this data")
        mean, count = x.mean(0), self.count + len(x)
        rows = [x - mean]
        if self.kept is not None:
            weight = (self.count * len(x) / count) ** 0.5
            rows += [self.kept, (weight * (mean - self.mean))[None]]
        _, values, Vh = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        keep = 4 * self.rank + 16
        self.kept = values[:keep, None] * Vh[:keep]
        self.mean = (self.count * self.mean + len(x) * mean) / count
        self.count = count

    def directions(self) -> Tensor:
        if self.kept is None:
            raise LorakitError(
                f"at {self.place.label!r}: the layer was not called with the data; exclude it, or use another init"
            )
        norms = self.kept.norm(dim=1)
        found = int((norms > norms.max() * 1e-6).sum()) if len(norms) else 0
        if found < self.rank:
            raise LorakitError(
                f"at {self.place.label!r}: the data spans {found} directions there, fewer than rank {self.rank}; "
                "give more data, or use a smaller rank"
            )
        return cast(Tensor, self.kept[: self.rank] / norms[: self.rank, None])


def _gradients(sources: Sources, places: list[Place], ranks: list[int]) -> list[Tensor]:
    """The mean gradient of the loss for each weight, in its shape."""
    if sources.loss is None:
        raise LorakitError("init='lora-ga' needs loss=, a function (model, batch) -> loss")
    weights = [base_weight(place.layer, place.kind.parameter) for place in places]
    sums: list[Any] = [0.0] * len(weights)
    count = 0
    with _differentiable(sources.model, weights), torch.enable_grad():
        for batch in _batches(sources, "init='lora-ga'"):
            gradients = torch.autograd.grad(sources.loss(sources.model, batch), weights, allow_unused=True)
            for i, gradient in enumerate(gradients):
                if gradient is None:
                    raise LorakitError(f"at {places[i].label!r}: the loss does not depend on it; exclude it")
                sums[i] = sums[i] + gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            count += 1
    return [total / count for total in sums]


def _originals(sources: Sources, places: list[Place], ranks: list[int]) -> list[Tensor]:
    """The weights of the same names in the model before it was quantized."""
    if sources.original is None:
        raise LorakitError("init='loftq' needs original=, the model before it was quantized")
    found = []
    for place in places:
        try:
            weight = base_weight(sources.original.get_submodule(place.path), place.kind.parameter)
        except AttributeError:
            raise LorakitError(
                f"the original has no {place.parameter!r}: give the same model before quantization"
            ) from None
        found.append(weight.detach())
    return found


_GATHER: dict[Evidence, Callable[[Sources, list[Place], list[int]], list[Tensor]]] = {
    "inputs": _inputs,
    "gradients": _gradients,
    "original": _originals,
}


def _batches(sources: Sources, who: str) -> Iterator[Any]:
    """The batches, at least one, each run on the base alone and without a trace."""
    if sources.data is None:
        raise LorakitError(f"{who} needs data=, batches to run the model on")
    empty = True
    for batch in sources.data:
        empty = False
        with ExitStack() as base:
            if find_root(sources.model) is not None:
                base.enter_context(disabled(sources.model))
            base.enter_context(spare_buffers(sources.model))
            yield batch
    if empty:
        raise LorakitError(f"{who}: data= has no batch; if it is an iterator, it may have been used up")


def _run(sources: Sources, batch: Any) -> None:
    if sources.loss is not None:
        sources.loss(sources.model, batch)
    elif isinstance(batch, Mapping):
        sources.model(**batch)
    elif isinstance(batch, tuple | list):
        sources.model(*batch)
    else:
        sources.model(batch)


@contextmanager
def _differentiable(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Gradients for these weights alone."""
    parameters = list(model.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
