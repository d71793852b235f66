"""loralib, the library of the paper (Hu et al. 2021): `<layer>.lora_A` and `<layer>.lora_B`, scaled with alpha/r.

Names and shapes alone do not say what a layer is. Embeddings have the names of linear layers. A `MergedLinear` has a
block of r rows of A and some rows of B for each of its parts that is adapted. A convolution's product B·A, (out·k,
in·k), is its weight's in memory, not as a matrix: only a model tells it from a linear layer's. No file has alpha.
"""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.algebra.low_rank import recompress
from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.factors import (
    Factors,
    Part,
    adapter_of,
    fact_of,
    factor_problem,
    factors_of,
    grouped,
    one_alpha,
    variant_of,
    whole_parts,
)
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.litgpt import is_litgpt
from lorakit.formats.names import Names, checked
from lorakit.header import PREFIX
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, LoRA

ENDINGS = {".lora_A": "A", ".lora_B": "B"}
_PARTS = 64
"""Of a merged projection, at most; the memory that its blocks take grows with them."""


def read_loralib(content: Content, known: Known) -> Adapter:
    """What `loralib.lora_state_dict` gave. Layers that only a model can tell are as they lie in the file."""
    groups, others = grouped(content.tensors, ENDINGS)
    problems: list[str] = []
    parts, merged, unknown = [], {}, False
    for path, found in groups.items():
        problem = factor_problem(path, found)
        if problem is not None:
            problems.append(problem)
            continue
        A, B = found["A"], found["B"]
        n, rest = divmod(A.shape[0], B.shape[1])
        if rest or not n or n > _PARTS or (n > 1 and B.shape[0] % n):
            problems.append(f"{path!r}: A {tuple(A.shape)}, B {tuple(B.shape)} are no factors, merged or not")
            continue
        enabled = known.enabled
        if n > 1 and enabled is not None and sum(enabled) != n:
            problems.append(f"{path!r}: {n} parts are adapted, and enabled={enabled} says {sum(enabled)}")
        elif n > 1:
            unknown = unknown or enabled is None
            merged[path] = list(enabled or [True] * n)
            B = _blocks(B, n, merged[path])
        alpha = None if known.alpha is None else known.alpha * n
        parts.append(Part(path, variant_of(path, problems, A.shape[0], alpha), {"A": A, "B": B}))
    missing = [*(["alpha"] if known.alpha is None else []), *(["enabled"] if unknown else [])]
    facts: dict[str, Any] = {"merged": merged} if merged else {}
    if known.enabled is not None:
        facts["enabled"] = list(known.enabled)
    parts += whole_parts(others)
    return adapter_of(
        content, "loralib", parts, problems, missing=tuple(missing), facts={"loralib": facts} if facts else {}
    )


def _blocks(B: Tensor, n: int, enabled: list[bool]) -> Tensor:
    """B of all rows and of rank n·r: of each part that is adapted its own r columns, and zero elsewhere."""
    d, r = B.shape[0] // n, B.shape[1]
    whole = B.new_zeros(len(enabled), d, n, r)
    rows = [i for i, on in enumerate(enabled) if on]
    whole[rows, :, torch.arange(n)] = B.view(n, d, r)
    return whole.view(len(enabled) * d, n * r)


def _from_blocks(B: Tensor, enabled: list[bool]) -> Tensor | None:
    """The inverse of `_blocks`; None if B has no such structure."""
    n = sum(enabled)
    if not n or B.dim() != 2 or B.shape[0] % len(enabled) or B.shape[1] % n:
        return None
    d, r = B.shape[0] // len(enabled), B.shape[1] // n
    rows = [i for i, on in enumerate(enabled) if on]
    small = B.view(len(enabled), d, n, r)[rows, :, torch.arange(n)].reshape(n * d, r)
    return small if torch.equal(_blocks(small, n, enabled), B) else None


def _merged(adapter: Adapter) -> dict[str, list[bool]]:
    """Which parts of merged projections are adapted, by layer, as it was read."""
    found = fact_of(adapter, "loralib").get("merged")
    return {path: parts for path, parts in found.items() if _are_parts(parts)} if isinstance(found, Mapping) else {}


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, bool) for each in value) and 0 < sum(value) <= _PARTS


def resolve_loralib(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The same, with what the model tells: which layers are embeddings, convolutions, or merged with one part.

    Raises:
        LorakitError: factors that do not fit the layer of their name: all of them in one error.
    """
    if names.model is None:
        return adapter
    modules, problems = dict(names.model.named_modules()), list[str]()
    facts = {**fact_of(adapter, "loralib"), "merged": _merged(adapter)}
    weights = [_in_model(weight, modules, facts, problems) for weight in adapter.weights]
    return checked(adapter, weights, problems, facts={**adapter.facts, "loralib": facts})


def _in_model(
    weight: AdapterWeight, modules: Mapping[str, nn.Module], facts: dict[str, Any], problems: list[str]
) -> AdapterWeight:
    entry, layer = weight.entry, modules.get(weight.entry.path)
    if isinstance(weight.variant, Full):
        inner = modules.get(entry.path.removesuffix(".conv"))  # loralib's convolution is a module around torch's
        if layer is None and entry.path.endswith(".conv") and isinstance(inner, nn.modules.conv._ConvNd):
            return weight._replace(entry=entry._replace(path=entry.path.removesuffix(".conv")))
        return weight
    if layer is None or entry.parameter != "weight" or not isinstance(weight.variant, LoRA):
        return weight
    if isinstance(layer, nn.Embedding):
        return weight._replace(entry=entry._replace(kind="Embedding"))
    A, B = weight.tensors["A"], weight.tensors["B"]
    if A.dim() != 2 or B.dim() != 2:
        return weight
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _convolution(weight, layer, facts, problems)
    enabled = facts.get("enabled") if _are_parts(facts.get("enabled")) else None
    rows = getattr(layer, "out_features", getattr(layer, "nf", None))  # nf of transformers' Conv1D
    if enabled and sum(enabled) == 1 and entry.path not in facts["merged"] and rows != B.shape[0]:
        facts["merged"] = {**facts["merged"], entry.path: list(enabled)}
        B = _blocks(B, 1, list(enabled))
    if rows is not None and rows != B.shape[0] and entry.path in facts["merged"]:
        problems.append(f"{weight.name!r} has {rows} rows here, and {B.shape[0]} with enabled={tuple(enabled or ())}")
    return weight._replace(tensors={**weight.tensors, "B": B})


def _convolution(weight: AdapterWeight, layer: Any, facts: dict[str, Any], problems: list[str]) -> AdapterWeight:
    """(out·k/g, in·k) in memory is the weight (out, in/g, k, k); as a matrix (out, in/g·k·k) its rank may be higher."""
    A, B, shape = weight.tensors["A"], weight.tensors["B"], tuple(layer.weight.shape)
    k, fits = shape[-1], B.shape[0] * A.shape[1] == layer.weight.numel()
    if set(shape[2:]) != {k} or A.shape[0] % k or A.shape[1] % k or not fits or layer.transposed:
        problems.append(f"{weight.name!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are none of a weight {shape}")
        return weight
    scale, out, r = weight.variant.scale * k, shape[0], A.shape[0] // k  # type: ignore[attr-defined]
    exact = _kronecker(B, out, r, k) if layer.groups == 1 and len(shape) == 4 else None
    if exact is not None:
        factors, rank, alpha = (exact, A.reshape(r, -1)), r, weight.variant.alpha  # type: ignore[attr-defined]
    else:
        delta = (B.double() @ A.double()).view(out, -1)
        try:
            wide = delta.shape[0] <= delta.shape[1]
            one = torch.eye(min(delta.shape), dtype=torch.float64)
            best = recompress(*((one, delta) if wide else (delta, one)), error=1e-7)
        except LorakitError as error:
            problems.append(f"{weight.name!r}: {error}")
            return weight
        dtype = torch.promote_types(A.dtype, torch.float32)
        factors, rank = (best.B.to(dtype), best.A.to(dtype)), best.B.shape[1]
        alpha = scale * rank
        facts["error"] = {**facts.get("error", {}), weight.entry.path: best.error}
    tensors = {
        "A": factors[1].view(rank, *shape[1:]).clone(),
        "B": factors[0].reshape(out, rank, *(1 for _ in shape[2:])).clone(),
    }
    return weight._replace(variant=replace(weight.variant, rank=rank, alpha=alpha), tensors=tensors)  # type: ignore[call-arg]


def _kronecker(B: Tensor, out: int, r: int, k: int) -> Tensor | None:
    """(out, r) if the factor is that with each number times the identity of k×k, as `write_loralib` makes it."""
    blocks = B.view(out, k, r, k)
    small = blocks[:, 0, :, 0]
    return small if torch.equal(torch.kron(small.contiguous(), torch.eye(k, dtype=B.dtype)), B) else None


def write_loralib(adapter: Adapter, known: Known) -> Written:
    """A file for `loralib` layers and their `load_state_dict(strict=False)`."""
    problems: list[str] = []
    lost: list[str] = []
    factors = factors_of(adapter, problems, lost)
    merged = _merged(adapter)
    if not factors and not problems:
        problems.append("no layer has low-rank factors")
    for each in factors:
        if each.weight.stacked:
            problems.append(f"{each.weight.name!r} is a stack of matrices")
    no_place("loralib", problems)
    parts = [sum(merged[each.path]) if each.path in merged else 1 for each in factors]
    # Of a merged layer r is the rank of one part.
    factors = [each._replace(alpha=each.alpha / n) for each, n in zip(factors, parts, strict=True)]
    alpha, factors = one_alpha(factors, lost)
    tensors: dict[str, Tensor] = {}
    for each in factors:
        A, B = _layout(each, merged, problems)
        tensors |= {f"{each.path}.lora_A": A.clone().contiguous(), f"{each.path}.lora_B": B.clone().contiguous()}
    for weight in adapter.weights:
        if isinstance(weight.variant, Full):
            tensors[weight.name] = weight.tensors["value"].detach().clone()
    no_place("loralib", problems)
    lost.insert(0, f"alpha, which is {alpha:g}: whoever reads it gives lora_alpha={alpha:g}")
    if merged:
        lost.append("which parts of merged projections are adapted: enable_lora of their layers")
    stream = io.BytesIO()
    torch.save({key: tensor.cpu() for key, tensor in tensors.items()}, stream)
    return Written({"lora.pt": stream.getvalue()}, tuple(lost))


def _layout(each: Factors, merged: Mapping[str, list[bool]], problems: list[str]) -> tuple[Tensor, Tensor]:
    """Its two matrices as loralib has them."""
    A, B, name = each.A, each.B, each.weight.name
    if each.path in merged:
        small = _from_blocks(B, merged[each.path])
        if small is None:
            problems.append(f"{name!r} is merged, and B is not of one block for each part of {merged[each.path]}")
        return A, B if small is None else small
    if A.dim() == 2:
        return A, B
    k = A.shape[-1]
    if A.dim() != 4 or A.shape[-2] != k:
        problems.append(f"{name!r}: loralib computes only convolutions of two axes with square kernels")
        return A, B
    if each.weight.entry.groups != 1:
        problems.append(
            f"{name!r}: of {each.weight.entry.groups} groups, and the order of loralib's rows is then another"
        )
    shape = each.weight.entry.shape
    if shape is not None and shape[0] != B.shape[0]:
        problems.append(f"{name!r}: loralib has no transposed convolutions")
    # B·A in memory: of each of the r kernels (in·k, k) k rows of in·k numbers, so that B's numbers repeat k times.
    return A.reshape(A.shape[0] * k, -1), torch.kron(B.flatten(1).contiguous(), torch.eye(k, dtype=B.dtype))


def _is_loralib(content: Content) -> bool:
    ends = any(key.endswith((".lora_A", ".lora_B")) or key in ("lora_A", "lora_B") for key in content.tensors)
    ours = "lorakit" in content.metadata or any(key.startswith(PREFIX) for key in content.tensors)
    return ends and not ours and not is_litgpt(content)


LORALIB = Format(
    "loralib",
    "Microsoft's loralib",
    _is_loralib,
    read_loralib,
    write_loralib,
    takes=("alpha", "enabled"),
    suffixes=(".pt", ".bin", ".pth"),
    resolve={"": resolve_loralib},
)
