"""torchtune: `layers.N.attn.q_proj.lora_a.weight` (r, in), `.lora_b.weight` (out, r) and DoRA's `.magnitude` (out,).

Its models have the rows of q and k with the two of each rotation beside each other, those of transformers in halves, so
that B is reordered between them, but for the families that torchtune rotates in halves too (Qwen, Phi-3).
"""

import io
import json
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lorakit.formats.content import Content
from lorakit.formats.factors import (
    Part,
    adapter_of,
    factor_problem,
    factors_of,
    grouped,
    one_rank,
    variant_of,
    whole_parts,
)
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.llama import joined, part_of, placed, sizes_of_q, split
from lorakit.formats.names import Names, checked, renamed
from lorakit.formats.rope import heads_of, reordered, to_halves, to_pairs
from lorakit.values.adapter import Adapter
from lorakit.variants import DoRA, Full

_ENDINGS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "magnitude"}
_TO_HF = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_FROM_HF = {hf: own for own, hf in _TO_HF.items()}
_OUTER = {"output": "lm_head", "tok_embeddings": "embed_tokens"}
_OWN = re.compile(r"^layers\.(\d+)\.(.+)$")
_HALVES = ("qwen", "phi3")
"""The families, as transformers names them, whose rows of q and k torchtune has in the same order."""


def read_torchtune(content: Content, known: Known) -> Adapter:
    """What torchtune's recipes save as adapter weights; alpha is in an `adapter_config.json` beside them, or given."""
    config = content.config or {}
    groups, others = grouped(content.tensors, _ENDINGS)
    problems: list[str] = []
    alpha = config.get("lora_alpha", known.alpha)
    if "lora_alpha" in config and known.alpha is not None:
        problems.append("its config says its alpha: leave alpha= away")
    parts = []
    for path, found in groups.items():
        problem = factor_problem(path, {name: found[name] for name in found if name != "magnitude"})
        if problem is not None:
            problems.append(problem)
            continue
        rank, B = found["A"].shape[0], found["B"]
        if "r" in config and config["r"] != rank:
            problems.append(f"{path!r}: A {tuple(found['A'].shape)} is not of the rank {config['r']!r} of its config")
        if "magnitude" in found and found["magnitude"].shape != (B.shape[0],):
            problems.append(f"{path!r}: its magnitude has shape {tuple(found['magnitude'].shape)}, not ({B.shape[0]},)")
        dropout = config.get("lora_dropout", 0.0)
        parts.append(Part(path, variant_of(path, problems, rank, alpha, dropout, "magnitude" in found), found))
    missing = ("alpha",) if alpha is None else ()
    parts += whole_parts(others)
    return adapter_of(content, "torchtune", parts, problems, missing=missing, naming="torchtune")


def resolve_torchtune(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The same with torchtune's own names if the model has them, else those of transformers, q and k reordered.

    Raises:
        LorakitError: names that the model does not have, or its heads are not known.
    """
    layers, problems = set(names.layers), list[str]()
    if any(weight.entry.path in layers for weight in adapter.weights):
        return checked(adapter, adapter.weights, problems)
    wanted = {weight.entry.path: _to_hf(weight.entry.path) for weight in adapter.weights}
    problems += [f"{path!r} has no name in transformers that is known" for path, hf in wanted.items() if hf is None]
    there = placed([hf for hf in wanted.values() if hf is not None], names, problems)
    paths = {path: there[hf] for path, hf in wanted.items() if hf is not None and hf in there}
    if problems:
        return checked(adapter, adapter.weights, problems)
    adapter = renamed(adapter, paths, problems)
    if _in_halves(names):
        return adapter
    heads = heads_of(names.config, known)
    weights = reordered(adapter.weights, part_of, heads, to_halves, problems, sizes_of_q(names))
    return checked(adapter, weights, problems)


def _in_halves(names: Names) -> bool:
    family = names.config.get("model_type")
    return isinstance(family, str) and family.startswith(_HALVES)


def _to_hf(path: str) -> str | None:
    if path in _OUTER:
        return joined(None, _OUTER[path])
    found = _OWN.match(path)
    return joined(found[1], _TO_HF[found[2]]) if found is not None and found[2] in _TO_HF else None


def _from_hf(path: str) -> str | None:
    found = split(path)
    if found is None:
        return None
    block, rest = found
    if block is None:
        return next(own for own, hf in _OUTER.items() if hf == rest)
    return f"layers.{block}.{_FROM_HF[rest]}" if rest in _FROM_HF else None


def write_torchtune(adapter: Adapter, known: Known) -> Written:
    """A directory with the weights under torchtune's names and a config. Needs the heads for names of transformers.

    `known.arch` names a family whose q and k torchtune rotates in halves, "qwen2", so that nothing is reordered.
    """
    problems: list[str] = []
    lost: list[str] = []
    own = {
        w.entry.path: w.entry.path for w in adapter.weights if adapter.naming == "torchtune" or _is_own(w.entry.path)
    }
    paths = {w.entry.path: own.get(w.entry.path) or _from_hf(w.entry.path) for w in adapter.weights}
    problems += [f"{path!r} has no name in torchtune that is known" for path, name in paths.items() if name is None]
    count = Counter(paths.values())
    problems += [f"{path!r} is {name!r}, and so is another" for path, name in paths.items() if name and count[name] > 1]
    if not own and not (known.arch or "").startswith(_HALVES):
        turned = reordered(adapter.weights, part_of, heads_of({}, known), to_pairs, problems)
        adapter = adapter.with_weights(turned)
    factors = factors_of(adapter, problems, lost, dora=True)
    whole = [weight.name for weight in adapter.weights if isinstance(weight.variant, Full)]
    if whole:
        problems.append(f"{len(whole)} parameters are trained as a whole, {whole[0]!r} the first")
    if not factors and not problems:
        problems.append("no layer has low-rank factors")
    kinds = {isinstance(each.weight.variant, DoRA) for each in factors}
    if len(kinds) > 1:
        problems.append("some weights have magnitudes (DoRA) and others not; torchtune has one kind for all")
    problems += [
        f"{each.weight.name!r}: torchtune has LoRA of linear layers only"
        for each in factors
        if each.A.dim() != 2 or each.weight.lookup
    ]
    no_place("torchtune", problems)
    alpha, rank, factors = one_rank(factors, lost)
    tensors: dict[str, Tensor] = {}
    for each in factors:
        name = paths[each.path]
        tensors |= {f"{name}.lora_a.weight": each.A, f"{name}.lora_b.weight": each.B}
        if "magnitude" in each.weight.tensors:
            tensors[f"{name}.magnitude"] = each.weight.tensors["magnitude"].detach().reshape(-1)
    stream = io.BytesIO()
    torch.save({key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}, stream)
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({str(paths[each.path]).rpartition(".")[2] for each in factors}),
        "peft_type": "LORA",
    }
    files = {"adapter_model.pt": stream.getvalue(), "adapter_config.json": json.dumps(config, indent=2).encode()}
    return Written(files, tuple(lost))


def _is_own(path: str) -> bool:
    found = _OWN.match(path)
    return path in _OUTER or (found is not None and found[2] in _TO_HF)


def is_torchtune(content: Content) -> bool:
    """By its keys: `.lora_a.weight` is nobody else's."""
    return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in content.tensors)


TORCHTUNE = Format(
    "torchtune",
    "torchtune",
    is_torchtune,
    read_torchtune,
    write_torchtune,
    takes=("alpha", "heads", "kv_heads"),
    asks=("heads", "kv_heads", "arch"),
    suffixes=(),
    directory=True,
    resolve={"torchtune": resolve_torchtune},
)
