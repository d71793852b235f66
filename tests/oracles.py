"""Each variant's ΔW as its paper writes it: dense, differentiable, and from nothing but torch."""

import math
from functools import singledispatch

import torch
from helpers import product, scale_of, tensors_of, weights_of
from torch import Tensor, nn

import lorakit as lk
from lorakit.variants import Variant

Tensors = dict[str, Tensor]


def dense_updates(plain: nn.Module, model: nn.Module, variant: Variant) -> tuple[Tensors, Tensors]:
    """Leaves, copies of what is trained by their keys; and ΔW of every adapted weight, computed from them."""
    trained = {name for name, _ in model.named_parameters()}
    leaves: Tensors = {}
    updates: Tensors = {}
    variant = lk.adapters(model)["default"].variant
    for weight in weights_of(model):
        mine = {}
        for key, tensor in tensors_of(model, weight).items():
            mine[key.rpartition(".")[2]] = copy = tensor.clone()
            if key in trained:
                leaves[key] = copy.requires_grad_()
        updates[weight] = delta(variant, plain, weight, mine)
    return leaves, updates


@singledispatch
def delta(variant: Variant, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    """ΔW in the weight's shape."""
    raise NotImplementedError(type(variant))


@delta.register
def _(variant: lk.LoRA, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    update = product(plain, weight, t["A"], t["B"])
    if "A0" in t:
        update = update - product(plain, weight, t["A0"], t["B0"])
    return scale_of(variant) * update


@delta.register
def _(variant: lk.LoRAFA, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    return scale_of(variant) * product(plain, weight, t["A"], t["B"])


@delta.register
def _(variant: lk.AdaLoRA, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    E = t["E"].view(*t["E"].shape[:-1], *(1 for _ in range(t["A"].dim() - t["E"].dim() + 1)))
    return scale_of(variant) * product(plain, weight, E * t["A"], t["B"])


@delta.register
def _(variant: lk.DoRA, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    W = plain.get_parameter(weight).detach()
    matrix = to_matrix(plain, weight, W + scale_of(variant) * product(plain, weight, t["A"], t["B"]).view(W.shape))
    norm = matrix.norm(dim=-1, keepdim=True).detach()
    scaled = t["magnitude"].view(norm.shape) / norm * matrix
    return from_matrix(plain, weight, scaled - to_matrix(plain, weight, W))


@delta.register
def _(variant: lk.VeRA, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    assert variant.sizes is not None
    (rows, columns), generator = variant.sizes, torch.Generator().manual_seed(variant.seed)
    A = nn.init.kaiming_uniform_(torch.empty(variant.rank, columns), generator=generator).to(t["b"].dtype)
    B = nn.init.kaiming_uniform_(torch.empty(rows, variant.rank), generator=generator).to(t["b"].dtype)
    *_, d, k = to_matrix(plain, weight, plain.get_parameter(weight)).shape
    return from_matrix(plain, weight, torch.diag_embed(t["b"]) @ B[:d] @ torch.diag_embed(t["d"]) @ A[:, :k])


@delta.register
def _(variant: lk.Full, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    layer, change = plain.get_submodule(weight.rpartition(".")[0]), t["value"] - plain.get_parameter(weight).detach()
    padding = getattr(layer, "padding_idx", None)
    return change if padding is None else change.index_fill(0, torch.tensor(padding), 0.0)


@delta.register
def _(variant: lk.Rows, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    change = torch.zeros_like(plain.get_parameter(weight), dtype=t["value"].dtype)
    for row, value in zip(variant.rows, t["value"], strict=True):
        change = change.index_put((torch.tensor(row),), value - plain.get_parameter(weight)[row].detach())
    return change


@delta.register
def _(variant: lk.LoHa, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    return from_matrix(plain, weight, scale_of(variant) * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]))


@delta.register
def _(variant: lk.LoKr, plain: nn.Module, weight: str, t: Tensors) -> Tensor:
    w1, w2 = (t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"] for name in ("w1", "w2"))
    if is_stack(plain, weight):
        matrix = torch.stack([torch.kron(a, b) for a, b in zip(w1, w2, strict=True)])
    else:
        matrix = torch.kron(w1, w2.flatten(1))
    return from_matrix(plain, weight, scale_of(variant) * matrix)


def is_stack(plain: nn.Module, weight: str) -> bool:
    """Whether it is a stack of matrices: slices are, and weights of three axes that no layer of torch's has."""
    if getattr(weight, "slices", ""):
        return True
    layer = plain.get_submodule(weight.rpartition(".")[0])
    return plain.get_parameter(weight).dim() == 3 and not type(layer).__module__.startswith("torch.nn")


def to_matrix(plain: nn.Module, weight: str, W: Tensor) -> Tensor:
    """(d, k): rows are outputs; (n, d, k) of a stack."""
    if slices := getattr(weight, "slices", ""):
        return torch.stack([part for letter, part in zip("qkv", W.chunk(3), strict=True) if letter in slices])
    layer = plain.get_submodule(weight.rpartition(".")[0])
    if is_stack(plain, weight):
        return W
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) or type(layer).__name__ == "Conv1D":
        return W.t()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return torch.cat([part.transpose(0, 1).flatten(1) for part in W.chunk(layer.groups)])
    return W.flatten(1)


def from_matrix(plain: nn.Module, weight: str, matrix: Tensor) -> Tensor:
    """The inverse, zero where nothing may change: M = I·M as a product of factors."""
    W = plain.get_parameter(weight)
    layer = plain.get_submodule(weight.rpartition(".")[0])
    kernel = W.shape[2:] if isinstance(layer, nn.modules.conv._ConvNd) else ()
    eye = torch.eye(matrix.shape[-2], dtype=matrix.dtype).expand(*matrix.shape[:-1], -1)
    return product(plain, weight, matrix.unflatten(-1, (matrix.shape[-1] // math.prod(kernel), *kernel)), eye)
