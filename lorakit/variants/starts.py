"""How two factors begin: at random, from the weight, or from data.

Most starts leave one factor at zero: B·A = 0, nothing changes. PiSSA, OLoRA and LoRA-GA begin with a product B₀·A₀
that is not zero, and as published subtract it from the stored weight. Here the weight stays: the update is
s·(B·A − B₀·A₀), zero at the start and the same function of A and B from there on.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.layers import Kind, accumulation_dtype
from lorakit.variants.low_rank import LowRank

_GAMMA = 16.0
"""LoRA-GA's γ, which sets how large its factors begin (Wang et al. 2024, arXiv:2407.05000, §4.1 and table 5)."""
FROM_VALUES = ("pissa", "olora", "lora-ga")
"""The starts whose first product is not zero, to be subtracted."""
_COMPUTED = (*FROM_VALUES, "loftq", "eva")
"""The starts that are no random draw."""


class Start(NamedTuple):
    """A and B as they begin, in the shapes in which the kind stores them."""

    A: Tensor
    B: Tensor


def start(spec: LowRank, kind: Kind, weight: Tensor, evidence: Tensor | None, *, frozen_A: bool = False) -> Start:
    """The factors for one weight, on its device, in at least 32 bits. An A that is never trained is not left at zero.

    Raises:
        LorakitError: the start has no meaning there, or lacks the data it is computed from.
    """
    a_shape, b_shape = kind.factor_shapes(weight, spec.rank)
    dtype = accumulation_dtype(weight.dtype)
    computed = spec.init in _COMPUTED
    if spec.init == "eva" and getattr(kind, "takes", "other") != "vectors":
        raise LorakitError(
            f"init={spec.init!r} takes principal directions of a layer's input vectors, and a {kind.name} has none; "
            "adapt linear layers so, or use another init"
        )
    if computed:
        _check_rank(spec, kind, weight)
    # B·A = 0, so nothing changes. Of a look-up it is A that begins at zero, one column for each index: what is
    # never looked up in training then stays as it was.
    draws_B = kind.lookup and not frozen_A
    zeros = torch.empty if weight.is_meta else torch.zeros
    A = (zeros if computed or draws_B else torch.empty)(a_shape, dtype=dtype, device=weight.device)
    B = (zeros if computed or not draws_B else torch.empty)(b_shape, dtype=dtype, device=weight.device)
    if weight.is_meta:
        return Start(A, B)
    if computed:
        matrices = _computed(spec, kind, weight, evidence, dtype)
        for factor, matrix in zip((A, B), matrices, strict=True):
            if matrix is not None:
                factor.copy_(matrix.reshape(factor.shape))
        return Start(A, B)
    random = B if draws_B else A
    if spec.init == "gaussian":
        random.normal_(std=1 / spec.rank if spec.std is None else spec.std)
    elif spec.init == "orthogonal":
        inner = len(kind.matrix_shape(weight)) - 1
        random.copy_(_orthonormal(random.flatten(inner)).view(random.shape))
    elif kind.lookup:
        random.normal_()
    else:
        bound = 1 / math.sqrt(kind.matrix_shape(weight)[-1])
        random.uniform_(-bound, bound)
    return Start(A, B)


def _orthonormal(like: Tensor) -> Tensor:
    """Random matrices of this shape with orthonormal rows, or columns where there are fewer of them."""
    rows, columns = like.shape[-2:]
    Q, R = torch.linalg.qr(like.new_empty((*like.shape[:-2], max(rows, columns), min(rows, columns))).normal_())
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over all such matrices
    return cast(Tensor, Q.mT if rows < columns else Q)


def _check_rank(spec: LowRank, kind: Kind, weight: Tensor) -> None:
    d, k = kind.matrix_shape(weight)[-2:]
    most = {"lora-ga": min(d, k) // 2, "eva": k}.get(spec.init, min(d, k))
    if spec.rank > most:
        raise LorakitError(
            f"init={spec.init!r} needs {'two directions' if spec.init == 'lora-ga' else 'a direction'} for each of "
            f"its ranks, and a {d}×{k} matrix has room for rank {most}, not {spec.rank}; use a smaller rank or another "
            "init"
        )


def _computed(
    spec: LowRank, kind: Kind, weight: Tensor, evidence: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """A and B as matrices; None for one that stays zero."""
    if spec.needs is not None and evidence is None:
        raise LorakitError(f"init={spec.init!r} is computed from data: give attach {_HOW[spec.needs]}")
    r = spec.rank
    if spec.init == "eva":  # Paischer et al. 2024, arXiv:2410.07170, §3.2
        assert evidence is not None
        return evidence[..., :r, :], None
    W = kind.matrix_of(weight.detach()).to(dtype)
    if spec.init == "olora":  # Büyükakyüz 2024, arXiv:2406.01775: W = Q·R
        Q, R = torch.linalg.qr(W)
        return R[..., :r, :], Q[..., :, :r]
    if spec.init == "lora-ga":  # Wang et al. 2024, arXiv:2407.05000, algorithm 1
        assert evidence is not None
        U, _, Vh = torch.linalg.svd(kind.matrix_of(evidence).to(dtype), full_matrices=False)
        size = W.shape[-2] ** 0.25 / math.sqrt(_GAMMA)
        return size * Vh[..., :r, :], size * U[..., :, r : 2 * r]
    if spec.init == "loftq":  # Li et al. 2023, arXiv:2310.08659, with the quantized weight as it is stored
        assert evidence is not None
        W = kind.matrix_of(evidence.detach()).to(dtype) - W
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)  # Meng et al. 2024, arXiv:2404.02948, §3
    live = values[..., :r] > torch.finfo(dtype).eps * values[..., :1]
    root = torch.where(live, values[..., :r] / spec.scale, 0).sqrt()
    # With both factors at zero a rank would never get a gradient: where W has no such direction, B alone is.
    return root.where(live, 1).unsqueeze(-1) * Vh[..., :r, :], U[..., :, :r] * root.unsqueeze(-2)


_HOW = {
    "inputs": "data=, batches to run the model on",
    "gradients": "data=, batches, and loss=, a function (model, batch) -> loss",
    "original": "original=, the model before it was quantized",
}
