"""An adapter for each row of a batch.

Rows are brought together by adapter, and all adapters' products are two batched ones: (E, r, k)·(E, k, m) and
(E, m, r)·(E, r, d) for E adapters with m vectors each. The factors are one after the other in memory for that. While
something trains they are put there at every call, as autograd must see; else at the first two calls of a layer in a
`per_row` block, and again if they changed. What is no product of two factors, or of too unequal groups, goes through
one adapter after the other.
"""

from dataclasses import dataclass
from operator import attrgetter, getitem, is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import LorakitError
from lorakit.layers.adapters import AdaptedWeight, Update
from lorakit.layers.choice import Layout, RowChoice
from lorakit.layers.kind import CalledKind, Inputs, VectorKind
from lorakit.layers.ready import NUMBERS, owner_of
from lorakit.layers.thin import Term, is_plain

_MANY = 16
"""Vectors for each adapter from which the order of thin products counts."""


def by_row(
    layer: nn.Module, adapted: AdaptedWeight, inputs: Inputs, base: Tensor, y: Tensor, frozen: Tensor | None = None
) -> Tensor:
    """The output y with the update of each row's adapter; rows of the base alone stay as they are to the bit.

    Each adapter computes its own rows alone, if all inputs have that axis. If `frozen` is given, the layer is
    y = x·Wᵀ + b with this W, none of which trains; then y is written into.
    """
    choice = cast(RowChoice, adapted.selection.rows)
    if base.dim() > 0 and base.shape[0] == len(choice.names) and not torch.is_grad_enabled():
        stacked: Stacked | None = choice.stacks.get(adapted.place)
        if stacked is not None and stacked.layout.rows.device == y.device and stacked.is_current(inputs[0], y):
            return _add_products(y, inputs[0], stacked, fresh=frozen is not None)
    own = adapted._modules
    names = tuple(name for name in choice.groups if name in own and adapted[name].enabled)
    if not names:
        return y
    kind = cast(CalledKind, adapted[names[0]].kind)
    if not kind.has_rows(layer, base) or base.shape[0] != len(choice.names):
        raise LorakitError(
            f"a {type(layer).__name__} returned {tuple(base.shape)}, where per_row was given {len(choice.names)} rows: "
            "its first axis must be the batch; run each adapter's rows apart with active(...)"
        )
    if isinstance(kind, VectorKind) and is_plain(inputs[0], y):
        layout = choice.layout(names, y.device)
        updates = [adapted[name] for name in names]
        terms = _terms(updates, inputs[0], y) if layout.pays else None
        if terms is not None:
            kind.check(layer, inputs[0], y)
            return _batched(choice, adapted, updates, terms, layout, inputs[0], y, frozen)
    for name in names:
        update = adapted[name]
        index = torch.tensor(choice.groups[name], device=y.device)
        if _sliceable(inputs, len(choice.names)):
            mine = tuple(x.index_select(0, index) if isinstance(x, Tensor) else x for x in inputs)
            part = update.beside(layer, mine, base.index_select(0, index), y.index_select(0, index), 1.0)
        else:  # bags of a flat list of indices: all rows, of which its own are taken
            part = update.beside(layer, inputs, base, y, 1.0).index_select(0, index)
        y = y.index_copy(0, index, part)
    return y


def _sliceable(inputs: tuple[Any, ...], rows: int) -> bool:
    """Whether every input can be cut along the batch. A flat list of indices cannot, whatever its length."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return all(x.dim() > 1 and x.shape[0] == rows for x in tensors)


def _terms(updates: list[Update], x: Tensor, y: Tensor) -> list[Term] | None:
    """What the updates add, if all are products of two factors that can be multiplied by x as it is."""
    dtype, device = x.dtype, x.device
    if y.dtype != dtype or x.shape[:-1] != y.shape[:-1]:
        return None
    terms = []
    for update in updates:
        term = update.term(1.0)
        if term is None or term[3] > 0 or term[0].dtype != dtype or term[0].device != device:
            return None
        terms.append(term)
    return terms


def _batched(
    choice: RowChoice,
    adapted: AdaptedWeight,
    updates: list[Update],
    terms: list[Term],
    layout: Layout,
    x: Tensor,
    y: Tensor,
    frozen: Tensor | None,
) -> Tensor:
    As, Bs = [term[0] for term in terms], [term[1] for term in terms]
    scales = [cast(float, term[2]) for term in terms]
    if frozen is not None and torch.is_grad_enabled():
        added: Tensor = _ByRow.apply(x, y.detach(), frozen, layout, scales, *As, *Bs)  # type: ignore[no-untyped-call]
        return added
    A, B = _stack(As, Bs, scales)
    # At the first call of a block nothing is kept: it may be the only one. From the second on it pays.
    kept = not torch.is_grad_enabled() and adapted.place in choice.seen
    kept = kept and len(updates) == sum(map(adapted._modules.__contains__, choice.groups))  # all of them are enabled
    choice.seen.add(adapted.place)
    sources = _sources(updates, As, Bs) if kept else None
    stacked = Stacked(A, B.mT if sources is None else B.mT.contiguous(), layout, tuple(updates), sources)
    if sources is not None:
        choice.stacks[adapted.place] = stacked
    return _add_products(y, x, stacked, fresh=frozen is not None)


@dataclass(frozen=True)
class Stacked:
    """The factors of several adapters: A (E, r, k), and s·Bᵀ (E, r, d); zeros where a rank is below the largest."""

    A: Tensor
    Bt: Tensor
    layout: Layout
    updates: tuple[Update, ...]
    sources: "Sources | None"
    """What they were taken from; None if that is computed at every call."""

    def is_current(self, x: Tensor, y: Tensor) -> bool:
        """Whether all that they were taken from is as it was. This runs at every call, so its loops are in C."""
        sources = self.sources
        return (
            sources is not None
            and all(map(_IS_ENABLED, self.updates))
            and all(map(is_, map(getitem, sources.owners, sources.names), sources.tensors))
            and list(map(_VERSION, sources.tensors)) == sources.versions
            and list(map(Tensor.data_ptr, sources.tensors)) == sources.places
            and list(map(NUMBERS, self.updates)) == sources.numbers
            and x.dtype == y.dtype == self.A.dtype
            and is_plain(x, self.A)
        )


@dataclass(frozen=True)
class Sources:
    """Tensors, how often each had been changed and where it lay, and the mappings of modules that hold them."""

    owners: list[dict[str, Any]]
    names: list[str]
    tensors: list[Tensor]
    versions: list[int]
    places: list[int]
    numbers: list[Any]
    """The scale and dropout of each update."""


_VERSION, _IS_ENABLED = attrgetter("_version"), attrgetter("enabled")


def _sources(updates: list[Update], As: list[Tensor], Bs: list[Tensor]) -> Sources | None:
    owners: list[dict[str, Any]] = []
    names, tensors = [], []
    for update, A, B in zip(updates, As, Bs, strict=True):
        if not hasattr(update, "scale") or not hasattr(update, "dropout"):
            return None  # there is no telling whether its term changed
        if cast(float, update.dropout) > 0:
            return None  # it acts in training only, and the mode may change
        for name, tensor in (("A", A), ("B", B)):
            owner = owner_of(update, name, tensor)
            if owner is None or tensor.is_inference():  # computed, or without a count of its changes
                return None
            owners.append(owner)
            names.append(name)
            tensors.append(tensor)
    versions, places = [t._version for t in tensors], [t.data_ptr() for t in tensors]
    return Sources(owners, names, tensors, versions, places, list(map(NUMBERS, updates)))


def _stack(As: list[Tensor], Bs: list[Tensor], scales: list[float]) -> tuple[Tensor, Tensor]:
    """A (E, r, k) and s·B (E, d, r)."""
    ranks = [A.shape[0] for A in As]
    rank = max(ranks)
    if min(ranks) < rank:
        As = [F.pad(A, (0, 0, 0, rank - A.shape[0])) for A in As]
        Bs = [F.pad(B, (0, rank - B.shape[1])) for B in Bs]
    B = torch.stack(Bs)
    if any(scale != 1 for scale in scales):
        B = B * torch.tensor(scales, dtype=B.dtype, device=B.device).view(-1, 1, 1)
    return torch.stack(As), B


def _add_products(y: Tensor, x: Tensor, stacked: Stacked, *, fresh: bool) -> Tensor:
    """Y + each row's product; x: (n, ..., k), y: (n, ..., d). A fresh y is written into, and has no gradient."""
    A, Bt, layout = stacked.A, stacked.Bt, stacked.layout
    if fresh:
        _into(y, _shrunk(x, A, layout), Bt, layout)
        return y
    update, rows = _by_rows(torch.bmm(_shrunk(x, A, layout), Bt), layout)
    return y.index_add(0, rows, update.view(len(rows), *y.shape[1:]))


def _sorted(x: Tensor, layout: Layout) -> Tensor:
    """The rows by adapter: (E, m, k) of (n, ..., k)."""
    mine = x if layout.in_order else x.index_select(0, layout.rows)
    return mine.reshape(layout.count, -1, x.shape[-1])


def _shrunk(x: Tensor, A: Tensor, layout: Layout) -> Tensor:
    """Each row's x·Aᵀ, (E, m, r), formed thin side first as in `thin`."""
    return torch.bmm(A, _sorted(x, layout).mT).mT


def _by_rows(update: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(rows, t, d) of (E, m, d), and which rows of the batch they are, without those that fill up."""
    update, rows = update.view(len(layout.rows), -1, update.shape[-1]), layout.rows
    if layout.filled is None:
        return update, rows
    return update.index_select(0, layout.filled), rows.index_select(0, layout.filled)


def _into(total: Tensor, thin: Tensor, wide: Tensor, layout: Layout) -> None:
    """Add each row's product of (E, m, r) and (E, r, d) to a total (n, ..., d) of which no gradient is known."""
    if layout.in_order:
        total.view(layout.count, -1, total.shape[-1]).baddbmm_(thin, wide)
        return
    update, rows = _by_rows(torch.bmm(thin, wide), layout)
    total.view(total.shape[0], -1, total.shape[-1]).index_add_(0, rows, update)


class _ByRow(torch.autograd.Function):
    """The frozen linear map with an update for each row, computed as in `thin`: y is x·Wᵀ + b, and is written into.

    It takes every adapter's A and then every B, which it stacks itself: as nodes of autograd's graph, what hundreds of
    small tensors go through would cost more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, layout: Layout, scales: list[float], *factors: Tensor
    ) -> Tensor:
        A, B = _stack(list(factors[: layout.count]), list(factors[layout.count :]), scales)
        h = _shrunk(x, A, layout)
        y = y.detach()
        _into(y, h, B.mT, layout)
        ctx.layout, ctx.scales = layout, scales
        ctx.save_for_backward(x, weight, h, A, B, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layout, scales, count = ctx.layout, ctx.scales, ctx.layout.count
        x, weight, h, A, B, *factors = ctx.saved_tensors
        again = (
            torch.is_grad_enabled()
        )  # the gradient's own gradient is wanted: all must lead back to x and the factors
        if again:
            A, B = _stack(factors[:count], factors[count:], scales)
            h = _shrunk(x, A, layout)
        g = gradients[0].contiguous()
        own = _sorted(g, layout)
        if layout.filled is not None:  # a row that fills up is nobody's
            mask = own.new_zeros(len(layout.rows)).index_fill(0, layout.filled, 1)
            own = own * mask.view(count, layout.largest, 1).repeat_interleave(own.shape[1] // layout.largest, 1)
        many = own.shape[1] >= _MANY  # then thin sides come first, as in `thin`
        u = torch.bmm(B.mT.contiguous(), own.mT).mT if many else torch.bmm(own, B)  # (E, m, r)
        gx = None
        found: list[Tensor | None] = [None] * (2 * count)
        _, _, _, _, _, *needed = ctx.needs_input_grad
        if any(needed[:count]):
            gA = torch.bmm(u.mT, _sorted(x, layout))
            found[:count] = [_first(each, A.shape[0], 0) for each, A in zip(gA.unbind(), factors[:count], strict=True)]
        if any(needed[count:]):
            gB = torch.bmm(h.mT, own).mT if many else torch.bmm(own.mT, h)  # (E, d, r)
            if any(scale != 1 for scale in scales):
                gB = gB * torch.tensor(scales, dtype=gB.dtype, device=gB.device).view(-1, 1, 1)
            found[count:] = [_first(each, B.shape[1], 1) for each, B in zip(gB.unbind(), factors[count:], strict=True)]
        if ctx.needs_input_grad[0]:
            gx = F.linear(g, weight.t())
            if again:
                gx = gx.index_add(0, layout.rows, torch.bmm(u, A).view(len(layout.rows), *gx.shape[1:]))
            else:
                _into(gx, u, A, layout)
        return gx, None, None, None, None, *(each if needed[i] else None for i, each in enumerate(found))


def _first(x: Tensor, rank: int, axis: int) -> Tensor:
    """The part of a gradient that belongs to the factor, and not to the zeros that filled it up."""
    return x if x.shape[axis] == rank else x.narrow(axis, 0, rank)
