"""LyCORIS' methods as tensors of ours: Kronecker factors, Tucker cores, a whole ΔW, magnitudes (arXiv:2309.14859)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.variants import LoKr, Variant
from lorakit.variants.lokr import split

_MOST = 2**28
"""Numbers that a Tucker core may grow to: a small file that says more is no adapter."""
_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64} | {
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
}


def alpha_of(value: Tensor | None) -> float | None:
    """The numerator of the scale; None, which is the rank, if it is 0 or there is none.

    Raises:
        LorakitError: it is no one number of at least 0.
    """
    if value is None:
        return None
    if value.numel() != 1 or value.dtype not in _NUMBERS or value.is_meta:
        raise LorakitError(f"its alpha is of shape {tuple(value.shape)} and {value.dtype}, not one number")
    alpha = float(value.to(torch.float64).reshape(()).item())
    if not (math.isfinite(alpha) and alpha >= 0):
        raise LorakitError(f"its alpha is {alpha}, which must be a finite number of at least 0")
    return alpha or None


def magnitude_of(parts: Mapping[str, Tensor], B: Tensor, A: Tensor) -> Tensor:
    """DoRA's m, (d,), or (1, d, 1, …) of a convolution, from LyCORIS' and OneTrainer's dora_scale.

    That is (d, 1, …) where the norm is over a row's inputs, as in the paper and here, and (1, k, 1, …) where it is over
    the outputs.

    Raises:
        LorakitError: it is of the other axis, or of a shape that does not say which.
    """
    scale, d, k = parts["dora_scale"], B.shape[0], A.shape[1]
    shape = tuple(scale.shape)
    if shape == (d, *(1 for _ in A.shape[1:])) or (shape == (d,) and d != k):
        return scale.reshape(d) if A.dim() == 2 else scale.reshape(1, d, *B.shape[2:])
    if shape == (1, k, *(1 for _ in A.shape[2:])):
        raise LorakitError(
            f"its dora_scale {shape} is a magnitude of each input (column), which DoRA here cannot hold: it has one of "
            "each output (row); train with wd_on_output, which OneTrainer calls 'norm on output'"
        )
    raise LorakitError(f"its dora_scale {shape} does not say whether it is of outputs ({d}, 1) or inputs (1, {k})")


def contracted(core: Tensor, down: Tensor) -> Tensor:
    """Σ_q core[p, q, *kernel]·down[q, i]: (r, i, *kernel), in float32 or wider.

    Raises:
        LorakitError: the two do not fit together, or the result would be too large.
    """
    shapes = f"core {tuple(core.shape)}, factor {tuple(down.shape)}"
    flat = down.flatten(1) if down.dim() >= 2 else down
    if core.dim() < 3 or flat.dim() != 2 or core.shape[1] != down.shape[0] or any(n != 1 for n in down.shape[2:]):
        raise LorakitError(f"{shapes} do not fit together")
    if core.shape[0] * flat.shape[1] * math.prod(core.shape[2:]) > _MOST:
        raise LorakitError(f"{shapes}: their product is too large")
    dtype = torch.promote_types(torch.promote_types(core.dtype, flat.dtype), torch.float32)
    product = torch.einsum("pq...,qi->pi...", core.to(dtype), flat.to(dtype))
    return product.contiguous()


def factors_of_diff(diff: Tensor) -> tuple[Tensor, Tensor]:
    """A whole ΔW as B·A: one of the two is the identity, so it is exact to the bit.

    Raises:
        LorakitError: it is no matrix, such as the change of a norm.
    """
    if diff.dim() < 2:
        raise LorakitError(f"its diff of shape {tuple(diff.shape)} changes no matrix, and only those can be held")
    d, k = diff.flatten(1).shape
    ones = [1 for _ in diff.shape[2:]]
    if k < d:
        return torch.eye(k, dtype=diff.dtype).reshape(k, *diff.shape[1:]), diff.reshape(d, k, *ones)
    return diff, torch.eye(d, dtype=diff.dtype).reshape(d, d, *ones)


def kronecker(parts: Mapping[str, Tensor]) -> tuple[Variant, Mapping[str, Tensor]]:
    """LoKr from W₁ and W₂, each whole or two factors; alpha counts only where one of them is two.

    Raises:
        LorakitError: they do not fit together.
    """
    tensors = {name: parts[key] for name, key in LoKr.file_names.items() if key in parts}
    if "lokr_t2" in parts and "w2" in tensors:
        raise LorakitError("it has lokr_t2 beside a whole lokr_w2")
    if "lokr_t1" in parts:
        raise LorakitError("it has lokr_t1, which is not known")
    if "lokr_t2" in parts and {"w2_a", "w2_b"} <= tensors.keys():  # a: (r, d₂), b: (r, k₂), core (r, r, *kernel)
        if tensors["w2_a"].dim() != 2:
            raise LorakitError(f"its lokr_w2_a {tuple(tensors['w2_a'].shape)} is no matrix")
        tensors["w2_b"] = contracted(parts["lokr_t2"], tensors["w2_b"]).flatten(1)
        tensors["w2_a"] = tensors["w2_a"].mT.contiguous()
        dtype = tensors["w2_b"].dtype
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    (d1, k1), (d2, k2), ranks = _sides(tensors, shapes)
    factor = _factor((d1, d2), (k1, k2), math.prod(tensors["w2"].shape[2:]) if "w2" in tensors else None)
    if len(ranks) > 1:
        raise LorakitError(f"{shapes} are of different ranks")
    if ranks:
        return LoKr(ranks.pop(), alpha_of(parts.get("alpha")), factor, "w1_a" in tensors), tensors
    alpha_of(parts.get("alpha"))
    inner = tensors["w2"].shape
    return LoKr(max(1, math.ceil(max(inner[0], inner[1]) / 2)), None, factor), tensors


def _sides(tensors: Mapping[str, Tensor], shapes: str) -> tuple[tuple[int, int], tuple[int, int], set[int]]:
    """The shapes of W₁ and W₂ as matrices, and the ranks they have."""
    sides, ranks = [], set()
    for name in ("w1", "w2"):
        whole, a, b = (tensors.get(name + end) for end in ("", "_a", "_b"))
        if (whole is None) == (a is None and b is None) or (a is None) != (b is None):
            raise LorakitError(f"{shapes}: lokr_{name} must be there as a whole or as two factors")
        if whole is not None:
            if whole.dim() < 2 or (name == "w1" and whole.dim() != 2) or not whole.numel():
                raise LorakitError(f"{shapes}: lokr_{name} is no matrix")
            sides.append((whole.shape[0], whole.flatten(1).shape[1]))
            continue
        assert a is not None and b is not None
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or not a.numel() or not b.numel():
            raise LorakitError(f"{shapes}: lokr_{name}_a and lokr_{name}_b are no two factors of one rank")
        ranks.add(b.shape[0])
        sides.append((a.shape[0], b.shape[1]))
    return sides[0], sides[1], ranks


def _factor(d: tuple[int, int], k: tuple[int, int], kernel: int | None) -> int | tuple[int, int]:
    """The factor that splits both sides so, or the two: W₁'s shape; the kernel belongs to the second part of inputs."""
    if d[0] == k[0]:
        return d[0]
    if kernel is not None:
        k = (k[0], k[1] // kernel)
        for factor in (max(d[0], k[0]), -1):
            if split(d[0] * d[1], factor) == d and split(k[0] * k[1], factor) == k:
                return factor
    return d[0], k[0]
