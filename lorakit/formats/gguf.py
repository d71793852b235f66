"""GGUF adapters, as llama.cpp reads them: `<tensor>.lora_a`, `<tensor>.lora_b`, and one alpha.

llama.cpp multiplies with alpha over the rank of the tensor at hand, and with 1 if alpha is 0. Names are translated by
the maps of the `gguf` package. Where its converter reorders the rows of q and k for the rotation, so does this.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.factors import (
    Factors,
    Part,
    adapter_of,
    fact_of,
    factor_problem,
    factors_of,
    folded,
    grouped,
    one_alpha,
    variant_of,
)
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.gguf_file import gguf_bytes, package
from lorakit.formats.llama import joined, part_of, sizes_of_q, split
from lorakit.formats.names import Names, checked, renamed
from lorakit.formats.rope import heads_of, reordered, to_halves, to_pairs
from lorakit.values.adapter import Adapter
from lorakit.variants import Full

_ENDINGS = {".lora_a": "A", ".lora_b": "B"}
_EMBEDDING = "token_embd"
_REORDERED = frozenset(
    {"llama", "deci", "granite", "granitemoe", "granitehybrid", "arcee", "smollm3", "olmo", "xverse", "minicpm"}
    | {"arctic", "deepseek", "chameleon", "llada", "mistral3"}
)
"""Architectures with neighbours in a rotation there and halves in transformers: the converter reorders q and k."""
_FUSED = frozenset({"baichuan", "internlm2", "bailingmoe"})
"""The same where transformers has q, k and v in one weight, which is taken apart: not translated here."""
_BLOCKS = 4096


def read_gguf_adapter(content: Content, known: Known) -> Adapter:
    """A LoRA for llama.cpp, with the names that it has there."""
    values = {key: json.loads(value) for key, value in content.metadata.items()}
    problems: list[str] = []
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if values.get(key, wanted if key == "adapter.type" else None) != wanted:
            problems.append(f"{key} is {values.get(key)!r}, not {wanted!r}: it is no LoRA")
    if "adapter.alora.invocation_tokens" in values:
        problems.append("it acts only after some tokens (adapter.alora.invocation_tokens), which is not known here")
    alpha = values.get("adapter.lora.alpha", 0.0)
    groups, others = grouped(content.tensors, _ENDINGS)
    parts = []
    for name, found in groups.items():
        axes = 3 if "B" in found and found["B"].dim() == 3 else 2
        problem = factor_problem(name, found, axes)
        if problem is not None:
            problems.append(problem)
            continue
        path, _, parameter = name.rpartition(".")
        if path == _EMBEDDING:
            found = {**found, "A": found["A"].mT.contiguous()}
        variant = variant_of(name, problems, found["A"].shape[-2], None if alpha == 0 else alpha)
        parts.append(Part(path, variant, found, parameter, "Embedding" if path == _EMBEDDING else None))
    norms = [name for name in others if "_norm" in name]
    problems += [f"{name!r} is no factor" for name in others if "_norm" not in name]
    facts = {"gguf": {"arch": values.get("general.architecture"), "alpha": alpha}}
    left_out = tuple(f"{name!r}, which llama.cpp ignores too" for name in norms)
    return adapter_of(content, "gguf", parts, problems, naming="gguf", left_out=left_out, facts=facts)


def resolve_gguf(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The same with the names of a model of transformers, q and k reordered where llama.cpp has them otherwise.

    Raises:
        LorakitError: names that the model does not have, heads that are not known, or the package is missing.
    """
    arch, problems = _arch(adapter, known), list[str]()
    layers = names.layers
    gguf_names = _gguf_names(arch, layers, problems)
    there: dict[str, list[str]] = {}
    for layer, name in gguf_names.items():
        there.setdefault(name, []).append(layer)
    paths: dict[str, str] = {}
    for weight in adapter.weights:
        here = there.get(weight.entry.path, [])
        if len(here) == 1:
            paths[weight.entry.path] = here[0]
        else:
            problems.append(f"the model has {len(here) or 'no'} layers that are {weight.name!r} of {arch}")
    if problems:
        return checked(adapter, adapter.weights, problems)
    adapter = renamed(adapter, paths, problems)
    if arch not in _REORDERED:
        return adapter
    heads = heads_of(names.config, known)
    weights = reordered(adapter.weights, part_of, heads, to_halves, problems, sizes_of_q(names))
    return checked(adapter, weights, problems)


def _arch(adapter: Adapter, known: Known) -> str:
    """The architecture as GGUF calls it."""
    arch = known.arch or fact_of(adapter, "gguf").get("arch")
    if not isinstance(arch, str):
        raise LorakitError(f"{adapter.name!r}: GGUF names the model's architecture: give arch=..., such as 'llama'")
    return arch


def _gguf_names(arch: str, layers: list[str], problems: list[str]) -> dict[str, str]:
    """Layers of transformers → their names in GGUF, of those that have one."""
    if arch in _FUSED:
        problems.append(f"{arch}: the rows of its q, k and v are taken apart and reordered, which is not done here")
    gguf = package("translating names to those of GGUF")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in kinds:
        problems.append(f"gguf knows no architecture {arch!r}")
        return {}
    numbers = [int(n) for layer in layers for n in re.findall(r"(?:^|\.)(\d{1,9})(?=\.|$)", layer)]
    # Numbers are those of blocks first of all; a layer beyond them has no name.
    blocks = min(max(numbers, default=0) + 1, _BLOCKS)
    table = gguf.get_tensor_name_map(kinds[arch], blocks)
    found = {}
    for layer in layers:
        own = split(layer)
        names = [layer] if own is None else [layer, joined(*own)]  # a model without its head has no "model." before
        name = next((n for each in names if (n := table.get_name(f"{each}.weight", (".weight",))) is not None), None)
        if name is not None:
            found[layer] = name.removesuffix(".weight")
    return found


def write_gguf(adapter: Adapter, known: Known) -> Written:
    """One file for llama.cpp. Names of transformers need `arch`, and for most architectures `heads` and `kv_heads`."""
    problems: list[str] = []
    lost: list[str] = []
    arch = _arch(adapter, known)
    adapter, paths = _named(adapter, arch, known, problems)
    factors = factors_of(adapter, problems, lost)
    problems += _unheld(adapter, factors)
    if not factors and not problems:
        problems.append("no layer has low-rank factors")
    no_place("gguf", problems)
    alpha, factors = _scaled(adapter, factors, lost)
    tensors: dict[str, Tensor] = {}
    for each in factors:
        name = f"{paths[each.path]}.weight"
        A = each.A.mT if paths[each.path] == _EMBEDDING else each.A
        tensors |= {f"{name}.lora_a": A.contiguous(), f"{name}.lora_b": each.B.contiguous()}
    values: dict[str, str | float] = {
        "general.architecture": arch,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        lost.append("digits beyond 32 bits")
        tensors = {key: t.float() if t.dtype == torch.float64 else t for key, t in tensors.items()}
    return Written({"adapter.gguf": gguf_bytes(values, tensors)}, tuple(lost))


def _named(adapter: Adapter, arch: str, known: Known, problems: list[str]) -> tuple[Adapter, Mapping[str, str | None]]:
    """The adapter with its rows as GGUF has them, and what its layers are called there."""
    if adapter.naming == "gguf":
        return adapter, {weight.entry.path: weight.entry.path for weight in adapter.weights}
    layers = list(dict.fromkeys(weight.entry.path for weight in adapter.weights))
    names = _gguf_names(arch, layers, problems)
    problems += [f"{layer!r} has no name in GGUF's {arch}" for layer in layers if layer not in names]
    count = Counter(names.values())
    problems += [f"{layer!r} is {name!r}, and so is another" for layer, name in names.items() if count[name] > 1]
    if arch in _REORDERED:
        turned = reordered(adapter.weights, part_of, heads_of({}, known), to_pairs, problems)
        adapter = adapter.with_weights(turned)
    return adapter, names


def _unheld(adapter: Adapter, factors: list[Factors]) -> list[str]:
    """What llama.cpp does not read."""
    problems = [
        f"{weight.name!r} is trained as a whole, which llama.cpp does not read"
        for weight in adapter.weights
        if isinstance(weight.variant, Full)
    ]
    for each in factors:
        if each.A.dim() > 2 and not each.weight.stacked:
            problems.append(f"{each.weight.name!r}: llama.cpp has no LoRA of convolutions")
        if each.weight.entry.parameter != "weight":
            problems.append(f"{each.weight.name!r}: it is no layer's own weight")
    return problems


def _scaled(adapter: Adapter, factors: list[Factors], lost: list[str]) -> tuple[float, list[Factors]]:
    """The one alpha of the file, a float of 32 bits, and the factors for it."""
    if all(each.scale == 1 for each in factors) and (
        fact_of(adapter, "gguf").get("alpha") == 0 or len({each.rank for each in factors}) > 1
    ):
        return 0.0, factors  # a scale of 1 at every rank
    alpha, factors = one_alpha(factors, lost)
    (short,) = struct.unpack("<f", struct.pack("<f", alpha)) if abs(alpha) < 3e38 else (0.0,)
    if short != alpha:  # a power of two is held exactly, and B takes the rest
        rounded: list[str] = []
        factors = [folded(each, 1.0, each.rank, rounded) for each in factors]
        alpha = 1.0
        if rounded:
            lost.append("the last bit of B: alpha is no number of 32 bits, and is folded into it")
    return alpha, factors


def _is_gguf(content: Content) -> bool:
    return content.container == "gguf"


GGUF = Format(
    "gguf",
    "llama.cpp's GGUF",
    _is_gguf,
    read_gguf_adapter,
    write_gguf,
    takes=("heads", "kv_heads", "arch"),
    asks=("heads", "kv_heads", "arch"),
    suffixes=(".gguf",),
    resolve={"gguf": resolve_gguf},
)
