"""LitGPT: `lit_model.pth.lora` beside `hyperparameters.yaml`, with one projection of q, k and v.

The fused projection has a block of r rows of A for each part that is adapted, and in B the rows of these parts, one
after the other. Where they go in the weight differs: `attn.qkv` has all of q, then k, then v; `attn.attn`, of older
versions, has for each group its queries, its key and its value. How many rows are whose follows from the heads.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.formats.content import Content, read_yaml
from lorakit.formats.factors import (
    Part,
    adapter_of,
    fact_of,
    factor_problem,
    grouped,
    variant_of,
    whole_parts,
)
from lorakit.formats.form import Known
from lorakit.formats.llama import joined, placed
from lorakit.formats.names import Names, checked
from lorakit.formats.rope import Heads, heads_of
from lorakit.header import PREFIX
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import LoRA

ENDINGS = {".lora_A": "A", ".lora_B": "B"}
BLOCK = re.compile(r"^transformer\.h\.(\d+)\.(.+)$")
TO_HF = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED = re.compile(r"^transformer\.h\.\d+\.attn\.(qkv|attn)$")
_OWN = re.compile(
    r"^transformer\.h\.\d+\.(attn\.(qkv|attn|proj)|mlp\.(fc(_[12])?|proj|gate|experts\.\d+\.\w+))\.lora_[AB]$"
)
_MOST = 2**20
"""Rows of a fused weight."""
_LARGEST = 2**28
"""Numbers in its B, once each part has columns of its own."""
SWITCHES = ("lora_query", "lora_key", "lora_value")


class Fused(NamedTuple):
    """How the rows of one fused projection are laid out."""

    enabled: tuple[bool, ...]
    own: tuple[Tensor, ...]
    """The rows of q, of k and of v in the weight."""
    blocks: tuple[Tensor, ...]
    """The rows that each block of A acts on, one for each part that is adapted."""

    @classmethod
    def of(cls, path: str, enabled: tuple[bool, ...], heads: int, groups: int, size: int) -> "Fused":
        """The layout of a projection with this name."""
        per_group, interleaved = heads // groups, path.endswith(".attn.attn")
        rows = torch.arange((heads + 2 * groups) * size)
        if interleaved:
            parts = [p.flatten() for p in rows.view(groups, -1).split([per_group * size, size, size], 1)]
        else:
            parts = list(rows.split([heads * size, groups * size, groups * size]))
        # Where all are adapted, the versions that interleave add B's rows to the weight's as they come.
        places = torch.cat([part for part, on in zip(parts, enabled, strict=True) if on])
        if interleaved and all(enabled):
            places = rows
        sizes = [len(part) for part, on in zip(parts, enabled, strict=True) if on]
        return cls(enabled, tuple(parts), places.split(sizes))

    def whole(self, B: Tensor) -> Tensor:
        """(rows of the weight, n·r) from (rows of the adapted parts, r)."""
        r = B.shape[1]
        result = B.new_zeros(sum(map(len, self.own)), len(self.blocks) * r)
        for i, (rows, block) in enumerate(zip(self.blocks, B.split([len(b) for b in self.blocks]), strict=True)):
            result[rows, i * r : (i + 1) * r] = block
        return result

    def compact(self, B: Tensor) -> Tensor | None:
        """The inverse of `whole`; None if B has no such blocks."""
        if B.dim() != 2 or B.shape[1] % len(self.blocks) or B.shape[0] != sum(map(len, self.own)):
            return None
        r = B.shape[1] // len(self.blocks)
        small = torch.cat([B[rows, i * r : (i + 1) * r] for i, rows in enumerate(self.blocks)])
        return small if torch.equal(self.whole(small), B) else None


def layout_of(path: str, enabled: tuple[bool, ...], heads: Heads, rows: int, all_rows: bool) -> Fused | str:
    """The layout of a projection with so many rows, of the weight or of the parts that are adapted; or why not."""
    q, kv = heads.q, heads.kv or heads.q
    if q is None or kv is None or q % kv:
        return f"{path!r}: {q} heads are no multiple of {kv} groups"
    counts = (q, kv, kv)
    total = sum(count for count, on in zip(counts, enabled, strict=True) if on or all_rows)
    if len(enabled) != 3 or not any(enabled) or rows % total:
        return f"{path!r}: {rows} rows are none of {q} heads and {kv} groups, of which q, k, v are adapted: {enabled}"
    if heads.size is not None and rows // total != heads.size:
        return f"{path!r}: its heads have {rows // total} rows, and {heads.size} in the model's config"
    size = rows // total
    if (q + 2 * kv) * size > _MOST:
        return f"{path!r}: {q} heads of {size} rows are more than any weight has"
    return Fused.of(path, enabled, q, kv, size)


def read_litgpt(content: Content, known: Known) -> Adapter:
    """What LitGPT's finetuning saved; heads from the `model_config.yaml` beside it, or given."""
    config = content.config or {}
    groups, others = grouped(content.tensors, ENDINGS)
    problems: list[str] = []
    enabled, heads = _enabled(config, known, problems), _heads(content, known, problems)
    alpha = config.get("lora_alpha", known.alpha)
    if "lora_alpha" in config and known.alpha is not None:
        problems.append("its hyperparameters.yaml says its alpha: leave alpha= away")
    missing = ["alpha"] if alpha is None else []
    if any(FUSED.match(path) for path in groups):
        missing += [name for name, value in (("enabled", enabled), ("heads", heads.q)) if value is None]
    parts = []
    for path, found in groups.items():
        factors = _factors(path, found, enabled, heads, config.get("lora_r"))
        if isinstance(factors, str):
            problems.append(factors)
            continue
        A, B, n = factors
        variant = variant_of(path, problems, A.shape[0] // n, alpha, config.get("lora_dropout", 0.0))
        if n > 1:
            more = None if variant.alpha is None else variant.alpha * n
            variant = replace(variant, rank=variant.rank * n, alpha=more)
        parts.append(Part(path, variant, {"A": A, "B": B}))
    facts = {"heads": heads.q, "kv_heads": heads.kv or heads.q, "enabled": None if enabled is None else list(enabled)}
    parts += whole_parts(others)
    rest = {"missing": tuple(missing), "naming": "litgpt", "facts": {"litgpt": facts}}
    return adapter_of(content, "litgpt", parts, problems, **rest)


def _factors(
    path: str, found: Mapping[str, Tensor], enabled: tuple[bool, ...] | None, heads: Heads, rank: Any
) -> tuple[Tensor, Tensor, int] | str:
    """A, B and how many parts they are of; B of all rows, if they are of a fused weight. Or what is wrong."""
    problem, fused = factor_problem(path, found), FUSED.match(path) is not None
    if problem is not None:
        return problem
    A, B = found["A"], found["B"]
    n, r = A.shape[0] // B.shape[1], B.shape[1]
    if A.shape[0] % r or not 1 <= n <= (3 if fused else 1):
        return f"{path!r}: A {tuple(A.shape)}, B {tuple(B.shape)} are no factors"
    if rank is not None and rank != r:
        return f"{path!r}: its rank is {r}, and lora_r is {rank!r}"
    if not fused:
        return A, B, 1
    if enabled is not None and sum(enabled) != n:
        return f"{path!r}: {n} of q, k, v are adapted, and {enabled} says {sum(enabled)}"
    if enabled is None or heads.q is None:
        return A, torch.block_diag(*B.tensor_split(n)), n  # to look at: which rows of the weight they are is not known
    layout = layout_of(path, enabled, heads, B.shape[0], all_rows=False)
    if isinstance(layout, str):
        return layout
    rows = sum(map(len, layout.own))
    if rows * A.shape[0] > _LARGEST:
        return f"{path!r}: a rank of {A.shape[0]} for {rows} rows is no adapter's"
    return A, layout.whole(B), n


def _enabled(config: Mapping[str, Any], known: Known, problems: list[str]) -> tuple[bool, ...] | None:
    """Which of q, k and v are adapted."""
    if not any(name in config for name in SWITCHES):
        if known.enabled is not None and len(known.enabled) != 3:
            problems.append(f"enabled={known.enabled} must say it of q, k and v")
        return known.enabled
    if known.enabled is not None:
        problems.append("its hyperparameters.yaml says which parts are adapted: leave enabled= away")
    return tuple(config.get(name) is True for name in SWITCHES)


def _heads(content: Content, known: Known, problems: list[str]) -> Heads:
    """From the model's config beside the file, else as given."""
    file = content.file.with_name("model_config.yaml")
    given = heads_of({}, known)
    if not file.is_file():
        return given
    found = heads_of(read_yaml(file), Known())
    for mine, theirs, what in ((given.q, found.q, "heads"), (given.kv, found.kv, "kv_heads")):
        if mine is not None and theirs is not None and mine != theirs:
            problems.append(f"{file.name} says {what}={theirs}, and it is {mine} as given or in the model's config")
    return Heads(found.q or given.q, found.kv or given.kv, found.size)


def resolve_litgpt(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The same with LitGPT's names if the model has them, else one update each for q, k and v of a Llama-like model.

    Raises:
        LorakitError: names that the model does not have, or rows that are not those of its heads.
    """
    layers, problems = set(names.layers), list[str]()
    if any(weight.entry.path in layers for weight in adapter.weights):
        return checked(adapter, adapter.weights, problems)
    split = [part for weight in adapter.weights for part in _in_hf(adapter, weight, problems)]
    there = placed([weight.entry.path for weight in split], names, problems)
    placed_weights = [
        weight._replace(entry=weight.entry._replace(path=there.get(weight.entry.path, weight.entry.path)))
        for weight in split
    ]
    return checked(adapter, placed_weights, problems)


def _in_hf(adapter: Adapter, weight: AdapterWeight, problems: list[str]) -> list[AdapterWeight]:
    """One weight with its name in transformers, or the parts of a fused one."""
    path = weight.entry.path
    found = BLOCK.match(path)
    rest = None if found is None else TO_HF.get(found[2])
    if path == "lm_head" or (found is not None and rest is not None):
        hf = "lm_head" if found is None else joined(found[1], rest or "")
        return [weight._replace(entry=weight.entry._replace(path=hf))]
    if found is None or FUSED.match(path) is None or not isinstance(weight.variant, LoRA):
        problems.append(f"{weight.name!r} has no name in a Llama-like model that is known")
        return []
    layout = fused_of(adapter, weight)
    if isinstance(layout, str):
        problems.append(layout)
        return []
    A, B, parts = weight.tensors["A"], weight.tensors["B"], []
    r = B.shape[1] // len(layout.blocks)
    for name, rows in zip(QKV, layout.own, strict=True):
        mine = [i for i, block in enumerate(layout.blocks) if bool(torch.isin(rows, block).any())]
        columns = torch.cat([torch.arange(i * r, (i + 1) * r) for i in mine]) if mine else None
        if columns is not None:
            variant = weight.variant
            alpha = None if variant.alpha is None else variant.alpha / len(layout.blocks) * len(mine)
            own = LoRA(len(columns), alpha, variant.dropout)
            tensors = {"A": A[columns].clone(), "B": B[rows][:, columns].clone()}
            entry = weight.entry._replace(path=joined(found[1], name))
            parts.append(AdapterWeight(entry, own, tensors))
    return parts


def fused_of(adapter: Adapter, weight: AdapterWeight) -> Fused | str:
    """The layout of a fused weight that was read, from what was read with it; or why there is none."""
    facts = fact_of(adapter, "litgpt")
    enabled, q, kv = facts.get("enabled"), facts.get("heads"), facts.get("kv_heads")
    whole = all(type(count) is int and 0 < count < 2**24 for count in (q, kv))
    if (
        not whole
        or not isinstance(enabled, list)
        or not all(isinstance(on, bool) for on in enabled)
        or len(enabled) != 3
    ):
        return (
            f"{weight.name!r}: which of its rows are q, k and v is not known: read it with heads=... and kv_heads=..."
        )
    layout = layout_of(weight.entry.path, tuple(enabled), Heads(q, kv), weight.tensors["B"].shape[0], all_rows=True)
    if not isinstance(layout, str) and weight.tensors["B"].shape[1] % len(layout.blocks):
        return f"{weight.name!r}: its rank is none of {len(layout.blocks)} parts"
    return layout


def is_litgpt(content: Content) -> bool:
    """By the names of LitGPT's layers, which end like loralib's."""
    if "lorakit" in content.metadata or any(key.startswith(PREFIX) for key in content.tensors):
        return False
    return any(_OWN.match(key) for key in content.tensors) or (
        content.file.name == "lit_model.pth.lora" and any(key.endswith(".lora_A") for key in content.tensors)
    )


def torch_file(tensors: Mapping[str, Tensor]) -> bytes:
    """The file, in which they are under "model"."""
    stream = io.BytesIO()
    torch.save({"model": {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}}, stream)
    return stream.getvalue()
