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

With few rows it is the calls into torch that count, not the arithmetic, and plain autograd has the fewest.
"""

from typing import Any, cast

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
    A, B, scale, dropout = term
    if not is_plain(x, A) or type(weight) not in _PLAIN or A.is_meta != x.is_meta:
        return add_thin_product(F.linear(x, weight, bias), x, term)
    trains = _trains(x, term)
    if trains and _pays(x, term) and not weight.requires_grad and (bias is None or not bias.requires_grad):
        return _fused(x, None, weight, bias, term)
    y = F.linear(x, weight, bias)
    if trains and _pays(x, term):
        return _fused(x, y, None, None, term)
    if trains:
        return add_few(y, x, A, B, cast(float, scale))
    return _add(y, _shrunk(x, A, dropout, _seed(term)), term, fresh=not y.requires_grad)


def add_few(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Y + s·(x·Aᵀ)·Bᵀ by plain autograd, for few rows; y is x·Wᵀ + b and nobody else's."""
    # It is written into, but not through a view, which autograd would watch: that costs more than a copy.
    return _add(y, _rows(x).mm(A.t()), (A, B, scale, 0.0), fresh=y.dim() == 2)


def add_thin_product(y: Tensor, x: Tensor, term: Term) -> Tensor:
    """Y + s·(D(x)·Aᵀ)·Bᵀ for x: (..., k) and y: (..., d)."""
    A, _, _, dropout = term
    if A.is_meta != y.is_meta:  # the kernels take factors on `meta` and return what lay in memory
        raise RuntimeError(f"the adapter is on {A.device} and the layer's output on {y.device}: move the model")
    if not is_plain(x, A) or type(y) is not Tensor:
        return _functional(y, x, term)
    if not (_trains(x, term) or (torch.is_grad_enabled() and y.requires_grad)):
        return _add(y, _shrunk(x, A, dropout, _seed(term)), term, fresh=False)
    if _pays(x, term):
        return _fused(x, y, None, None, term)
    return _add(y, _rows(x).mm(A.t()), term, fresh=False)


def _trains(x: Tensor, term: Term) -> bool:
    """Whether a gradient is wanted of the input or a factor."""
    return torch.is_grad_enabled() and (x.requires_grad or term[0].requires_grad or term[1].requires_grad)


def _pays(x: Tensor, term: Term) -> bool:
    """Whether the one function is cheaper than plain autograd, or keeps less for backward."""
    return x.numel() >= MANY * x.shape[-1] or term[3] > 0 or x.dtype != term[0].dtype


def is_plain(x: Tensor, A: Tensor) -> bool:
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
    return int(torch.randint(2**62, (), device="cpu")) if term[3] > 0 else 0


def _kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies x by, the same for the same seed: 0 or 1/(1 − p)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    ones = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous: the order of drawing must not differ
    return ones.bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


def _shrunk(x: Tensor, A: Tensor, dropout: float, seed: int) -> Tensor:
    """D(x)·Aᵀ, (n, r), in A's dtype; x: (..., k)."""
    x = _rows(x)
    if x.dtype != A.dtype:
        x = x.to(A.dtype)
    if dropout > 0:
        x = x * _kept(x, dropout, seed)
    return A.mm(x.t()).t() if x.shape[0] >= MANY else x.mm(A.t())


def _add(y: Tensor, h: Tensor, term: Term, fresh: bool) -> Tensor:
    """Y + s·h·Bᵀ; h: (n, r), y: (..., d). A fresh y is written into."""
    _, B, scale, _ = cast(tuple[Tensor, Tensor, float, float], term)
    if h.dtype != y.dtype:
        update = h.mm(B.t()).mul_(scale).to(y.dtype).view(y.shape)
        return y.add_(update) if fresh else y + update
    if not fresh:
        return torch.addmm(_rows(y), h, B.t(), alpha=scale).view(y.shape)
    rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    rows.addmm_(h, B.t()) if scale == 1 else rows.addmm_(h, B.t(), alpha=scale)
    return y


def _fused(x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, term: Term) -> Tensor:
    # Function.apply itself, without its look at functorch, which `_is_plain` had.
    apply: Any = super(torch.autograd.Function, _Fused).apply
    result: Tensor = apply(x, y, weight, bias, *term, _seed(term))[0]
    return result


class _Fused(torch.autograd.Function):
    """The update, and the frozen map with it if that is given (weight and bias) and not its output y.

    It returns h too: so a gradient of its gradient reaches A and x through what was kept.
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
        needs_x, _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        h = _shrunk(x, A, dropout, seed)
        fresh = y is None
        y = _add(F.linear(x, weight, bias) if y is None else y, h, (A, B, scale, dropout), fresh)  # type: ignore[arg-type]
        ctx.numbers = scale, dropout, seed, x.shape, x.dtype
        ctx.save_for_backward(x if needs_A else None, weight if needs_x else None, A, B, h if needs_B else None)
        ctx.set_materialize_grads(False)
        return y.detach(), h  # detached, it is no view: autograd would not let others write into one from here

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needs_x, needs_y, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        scale, dropout, seed, shape, dtype = ctx.numbers
        x, weight, A, B, h = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient's own gradient is wanted
        g, g_h = gradients  # the second only in such a second pass
        if g is None:
            g = A.new_zeros((*shape[:-1], B.shape[0]), dtype=dtype)
        gx = gA = gB = None
        rows = _rows(g)
        wide = rows if rows.dtype == A.dtype else rows.to(A.dtype)
        if needs_B:
            gB = _scaled(h.t().mm(wide).t(), scale, again)
        if needs_A or needs_x:
            u = B.t().contiguous().mm(wide.t()).t() if rows.shape[0] >= MANY else wide.mm(B)
            u = _scaled(u, scale, again)
            u = u if g_h is None else u + g_h
            if needs_A:
                seen = _rows(x)
                seen = seen if seen.dtype == A.dtype else seen.to(A.dtype)
                gA = u.t().mm(seen if dropout == 0 else seen * _kept(seen, dropout, seed))
            if needs_x:
                total = None if weight is None else rows.mm(weight)
                if total is not None and dropout == 0 and total.dtype == A.dtype:
                    gx = torch.addmm(total, u, A) if again else total.addmm_(u, A)
                else:
                    mine = u.mm(A)
                    mine = (mine if dropout == 0 else mine * _kept(mine, dropout, seed)).to(dtype)
                    gx = mine if total is None else total + mine
                gx = gx if len(shape) == 2 else gx.view(shape)
        return gx, g if needs_y else None, None, None, gA, gB, None, None, None


def _scaled(x: Tensor, scale: float, again: bool) -> Tensor:
    """S·x, in x itself unless its own gradient is wanted."""
    if scale == 1:
        return x
    return x * scale if again else x.mul_(scale)
