"""The fast update: two thin products beside a linear map. Every kind that is a linear map goes through here.

    y = x·Wᵀ + b + s·h·Bᵀ,  h = D(x)·Aᵀ          x: (n, k)  W: (d, k)  A: (r, k)  B: (d, r)  D: dropout

and with g = ∂L/∂y, and u = ∂L/∂h = s·g·B of shape (n, r):

    ∂L/∂B = s·gᵀ·h    ∂L/∂A = uᵀ·D(x)    ∂L/∂x = g·W + D(u·A)

The floor is the frozen layer, 4·n·d·k operations, and LoRA's own 6·n·r·(d + k). What is above it are passes over
(n, d) and (n, k), and slow orders of thin products, so with many rows one autograd function does all of it:

- the sum is formed in the layer's own output, and ∂L/∂x in the product g·W: no second tensor of that size, no sum;
- a product that is thin on one side is formed so that the thin side comes first: (A·xᵀ)ᵀ, (Bᵀ·gᵀ)ᵀ, (hᵀ·g)ᵀ. BLAS
  takes up to twelve times longer for the other order when r is small; beside that, a copy of B as (r, d) is nothing;
- for backward it keeps x as it came (not widened, not dropped: a seed draws the same entries again) and h, no more;
  of a frozen A only h.

With few rows the calls into torch are what counts, not the arithmetic, and plain autograd has the fewest.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

MANY = 128
"""Rows from which the arithmetic costs more than the calls."""

Strength = float | Tensor
"""What an update is multiplied by; a tensor of no axes in compiled code, which would be made anew for another float."""
Term = tuple[Tensor, Tensor, Strength, float]
"""A (r, k), B (d, r), the factor before B·A, and the probability of dropout."""


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, term: Term) -> Tensor:
    """x·Wᵀ + b + s·(D(x)·Aᵀ)·Bᵀ for x: (..., k)."""
    A, B, _, _ = term
    if _is_plain(x, A) and torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if frozen and _pays(x, term):
            y: Tensor = _Fused.apply(x, None, weight, bias, *term, _seed(term))[0]  # type: ignore[no-untyped-call]
            return y
    return add_thin_product(F.linear(x, weight, bias), x, term, fresh=True)


def add_thin_product(y: Tensor, x: Tensor, term: Term, *, fresh: bool = False) -> Tensor:
    """Y + s·(D(x)·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d). A fresh y is nobody else's and may be written into."""
    A, B, scale, dropout = term
    if A.is_meta != y.is_meta:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    if not _is_plain(x, A) or type(y) is not Tensor or isinstance(scale, Tensor):
        return _functional(y, x, term)
    if not (torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad or y.requires_grad)):
        return _add(y, _shrunk(_rows(x), A, dropout, _seed(term)), B, scale, fresh)
    if _pays(x, term):
        added: Tensor = _Fused.apply(x, y, None, None, *term, _seed(term))[0]  # type: ignore[no-untyped-call]
        return added
    h = _rows(x).mm(A.t())
    if fresh and y.dim() == 2:
        return y.addmm_(h, B.t()) if scale == 1 else y.addmm_(h, B.t(), alpha=scale)
    return torch.addmm(_rows(y), h, B.t(), alpha=scale).view(y.shape)


def _is_plain(x: Tensor, A: Tensor) -> bool:
    """Whether nothing but torch's eager autograd looks on: no subclass, transform, trace, compiler or autocast."""
    return (
        type(x) in _PLAIN
        and type(A) in _PLAIN
        and not torch._C._is_any_autocast_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not x.is_nested
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _pays(x: Tensor, term: Term) -> bool:
    """Whether the one function is cheaper than plain autograd, or keeps less for backward."""
    A, _, _, dropout = term
    return x.numel() >= MANY * x.shape[-1] or dropout > 0 or x.dtype != A.dtype


def _functional(y: Tensor, x: Tensor, term: Term) -> Tensor:
    """The same in operations that every transform of torch knows, none in place."""
    A, B, scale, dropout = term
    if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):  # autocast casts A and B, which is cheaper
        x = x.to(A.dtype)
    h = F.linear(F.dropout(x, dropout) if dropout > 0 else x, A) * scale
    if h.dtype != y.dtype or y.is_nested:
        return y + F.linear(h, B).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t()).view(y.shape)


def _rows(x: Tensor) -> Tensor:
    """(n, k) of (..., k)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _seed(term: Term) -> int:
    """What the dropped entries are drawn from: taken from torch's own generator, which checkpointing brings back."""
    return int(torch.randint(2**62, ())) if term[3] > 0 else 0


def _kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies x by, the same for the same seed: 0 or 1/(1 − p)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    ones = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous: the order of drawing must not differ
    return ones.bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


def _shrunk(x: Tensor, A: Tensor, dropout: float, seed: int) -> Tensor:
    """H = D(x)·Aᵀ, (n, r), in A's dtype; x: (n, k)."""
    if x.dtype != A.dtype:
        x = x.to(A.dtype)
    if dropout > 0:
        x = x * _kept(x, dropout, seed)
    return A.mm(x.t()).t() if x.shape[0] >= MANY else x.mm(A.t())


def _add(y: Tensor, h: Tensor, B: Tensor, scale: float, fresh: bool) -> Tensor:
    """Y + s·h·Bᵀ without gradients; h: (n, r), y: (..., d)."""
    if h.dtype != y.dtype:
        update = h.mm(B.t()).mul_(scale).to(y.dtype).view(y.shape)
        return y.add_(update) if fresh else y + update
    if not fresh:
        return torch.addmm(_rows(y), h, B.t(), alpha=scale).view(y.shape)
    rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    if scale == 1:
        rows.addmm_(h, B.t())
    else:
        rows.addmm_(h, B.t(), alpha=scale)
    return y


class _Fused(torch.autograd.Function):
    """The update, and the frozen map with it if that is given (weight and bias) and not its output y.

    Returns y, and h: what is kept must be an output for a gradient of this gradient to reach A and x through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        h = _shrunk(rows, A, dropout, seed)
        if y is None:
            assert weight is not None
            y = _add(F.linear(x, weight, bias), h, B, scale, fresh=True)
        else:
            y = _add(y, h, B, scale, fresh=False)
        needs_x, _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.numbers = scale, dropout, seed, x.dtype
        ctx.save_for_backward(x if needs_A else None, weight if needs_x else None, A, B, h if needs_B else None)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        x, weight, A, B, h = ctx.saved_tensors
        scale, dropout, seed, dtype = ctx.numbers
        needs_x, needs_y, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        g, g_h = gradients  # the second only in a gradient of a gradient
        gx = gA = gB = None
        rows = _rows(g) if g is not None else A.new_zeros((g_h.shape[0], B.shape[0]))  # type: ignore[union-attr]
        wide = rows.to(A.dtype)
        many = rows.shape[0] >= MANY
        if needs_B:
            gB = _scaled(h.t().mm(wide).t(), scale)
        if needs_A or needs_x:
            u = B.t().contiguous().mm(wide.t()).t() if many else wide.mm(B)
            u = _scaled(u, scale)
            u = u if g_h is None else u + g_h
            if needs_A:
                seen = _rows(x).to(A.dtype)
                gA = u.t().mm(seen if dropout == 0 else seen * _kept(seen, dropout, seed))
            if needs_x:
                gx = _into(None if weight is None else rows.mm(weight), u, A, dropout, seed, dtype).view(ctx.shape)
        return gx, g if needs_y else None, None, None, gA, gB, None, None, None


def _scaled(x: Tensor, scale: float) -> Tensor:
    """S·x, in x itself unless its own gradient is wanted."""
    if scale == 1:
        return x
    return x * scale if torch.is_grad_enabled() else x.mul_(scale)


def _into(total: Tensor | None, u: Tensor, A: Tensor, dropout: float, seed: int, dtype: torch.dtype) -> Tensor:
    """The input's gradient: total + D(u·A), in total itself unless its own gradient is wanted."""
    if total is not None and dropout == 0 and total.dtype == A.dtype:
        return torch.addmm(total, u, A) if torch.is_grad_enabled() else total.addmm_(u, A)
    mine = u.mm(A)
    if dropout > 0:
        mine = mine * _kept(mine, dropout, seed)
    mine = mine.to(dtype)
    if total is None:
        return mine
    return total + mine if torch.is_grad_enabled() else total.add_(mine)
