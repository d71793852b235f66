"""Writing for LitGPT: q, k and v of a block become one projection again."""

import torch
from torch import Tensor

from lorakit.formats.factors import Factors, factors_of, one_rank
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.litgpt import (
    BLOCK,
    FUSED,
    QKV,
    SWITCHES,
    TO_HF,
    fused_of,
    is_litgpt,
    read_litgpt,
    resolve_litgpt,
    torch_file,
)
from lorakit.formats.llama import split
from lorakit.values.adapter import Adapter
from lorakit.variants import Full

_FROM_HF = {hf: own for own, hf in TO_HF.items()}
_SWITCH = {"attn.proj": "lora_projection", "mlp.fc_1": "lora_mlp", "mlp.fc_2": "lora_mlp", "mlp.proj": "lora_mlp"}
_MLP = ("mlp.fc_1", "mlp.fc_2", "mlp.proj")

Pair = tuple[Tensor, Tensor]
"""A and B."""


def write_litgpt(adapter: Adapter, known: Known) -> Written:
    """`lit_model.pth.lora` and `hyperparameters.yaml`, from LitGPT's names or those of transformers."""
    problems: list[str] = []
    lost: list[str] = []
    own = any(BLOCK.match(weight.entry.path) for weight in adapter.weights)
    factors = factors_of(adapter, problems, lost)
    for weight in adapter.weights:
        if isinstance(weight.variant, Full):
            problems.append(f"{weight.name!r} is trained as a whole")
    for each in factors:
        if each.A.dim() != 2 or each.weight.lookup:
            problems.append(f"{each.weight.name!r}: LitGPT has LoRA of linear layers only")
    if not factors and not problems:
        problems.append("no layer has low-rank factors")
    no_place("litgpt", problems)
    parts, small = _parts(adapter, factors, problems) if own else ({}, factors)
    no_place("litgpt", problems)
    alpha, rank, small = one_rank(small, lost)
    if own:
        pairs, enabled = _kept(adapter, small, parts, problems)
    else:
        pairs, enabled = _fused(small, problems)
    no_place("litgpt", problems)
    tensors = {f"{path}.lora_{letter}": t for path, pair in pairs.items() for letter, t in zip("AB", pair, strict=True)}
    switches = dict.fromkeys(SWITCHES, False) | {"lora_projection": False, "lora_mlp": False, "lora_head": False}
    switches |= dict(zip(SWITCHES, enabled, strict=True))
    for path in pairs:
        found = BLOCK.match(path)
        switch = "lora_head" if found is None else _SWITCH.get(found[2])
        if switch is not None:
            switches[switch] = True
    drops = {getattr(each.weight.variant, "dropout", 0.0) for each in factors}
    if len(drops) == 1:
        lost = [each for each in lost if not each.startswith("dropout")]
    lines = [f"lora_r: {rank}", f"lora_alpha: {alpha:g}" if float(f"{alpha:g}") == alpha else f"lora_alpha: {alpha!r}"]
    lines += [f"lora_dropout: {max(drops):.17g}"]
    lines += [f"{name}: {str(on).lower()}" for name, on in switches.items()]
    files = {"lit_model.pth.lora": torch_file(tensors), "hyperparameters.yaml": ("\n".join(lines) + "\n").encode()}
    return Written(files, tuple(lost))


def _parts(adapter: Adapter, factors: list[Factors], problems: list[str]) -> tuple[dict[str, int], list[Factors]]:
    """Of fused weights in LitGPT's names how many parts they have, and all factors with the rank of one part."""
    parts: dict[str, int] = {}
    small = []
    for each in factors:
        if FUSED.match(each.path) is None:
            small.append(each)
            continue
        layout = fused_of(adapter, each.weight)
        B = None if isinstance(layout, str) else layout.compact(each.B)
        if isinstance(layout, str) or B is None:
            problems.append(layout if isinstance(layout, str) else f"{each.path!r}: B has not one block for each part")
            continue
        n = parts[each.path] = len(layout.blocks)
        small.append(each._replace(B=B, alpha=each.alpha / n, rank=each.rank // n))
    if any(each.rank != small[0].rank for each in small) and parts:
        problems.append("its ranks differ, and LitGPT has one: name its weights as transformers does first")
    return parts, small


def _kept(
    adapter: Adapter, small: list[Factors], parts: dict[str, int], problems: list[str]
) -> tuple[dict[str, Pair], tuple[bool, ...]]:
    """The pairs under the names they have."""
    fused = [each for each in small if each.path in parts]
    layout = fused_of(adapter, fused[0].weight) if fused else None
    enabled = (False,) * 3 if layout is None or isinstance(layout, str) else layout.enabled
    return {each.path: (each.A, each.B) for each in small}, enabled


def _fused(small: list[Factors], problems: list[str]) -> tuple[dict[str, Pair], tuple[bool, ...]]:
    """From names of transformers: q, k and v side by side, and what a block lacks as zeros."""
    blocks: dict[str, dict[str, Pair]] = {}
    pairs: dict[str, Pair] = {}
    for each in small:
        found = split(each.path)
        block, rest = (None, "") if found is None else found
        if rest == "lm_head":
            pairs["lm_head"] = (each.A, each.B)
        elif block is None or (rest not in QKV and rest not in _FROM_HF):
            problems.append(f"{each.path!r} has no name in LitGPT that is known")
        else:
            if rest in blocks.setdefault(block, {}):
                problems.append(f"{each.path!r} is there under another name too")
            blocks[block][rest] = (each.A, each.B)
    rows = {name: pair[1].shape[0] for mine in blocks.values() for name, pair in mine.items() if name in QKV}
    for block, mine in blocks.items():
        before = f"transformer.h.{block}."
        here = [mine[name] for name in QKV if name in mine]
        if here:
            like = here[0]
            full = [mine.get(name, _zeros(like, rows[name], like[0].shape[1])) for name in QKV if name in rows]
            pairs[before + "attn.qkv"] = (torch.cat([A for A, _ in full]), torch.cat([B for _, B in full]))
        own = {_FROM_HF[name]: pair for name, pair in mine.items() if name in _FROM_HF}
        own |= _rest_of_mlp(own)
        pairs |= {before + name: own[name] for name in ("attn.proj", *_MLP) if name in own}
    return pairs, tuple(name in rows for name in QKV)


def _zeros(like: Pair, d: int, k: int) -> Pair:
    """Factors of no effect for a d×k weight."""
    return like[0].new_zeros(like[0].shape[0], k), like[1].new_zeros(d, like[1].shape[1])


def _rest_of_mlp(own: dict[str, Pair]) -> dict[str, Pair]:
    """LitGPT adapts all three layers of an MLP or none: those that are not adapted, with zeros."""
    first = next((name for name in _MLP if name in own), None)
    if first is None:
        return {}
    A, B = own[first]
    wide, narrow = (A.shape[1], B.shape[0]) if first == "mlp.proj" else (B.shape[0], A.shape[1])
    sizes = {"mlp.fc_1": (wide, narrow), "mlp.fc_2": (wide, narrow), "mlp.proj": (narrow, wide)}
    return {name: _zeros((A, B), *sizes[name]) for name in _MLP if name not in own}


LITGPT = Format(
    "litgpt",
    "LitGPT",
    is_litgpt,
    read_litgpt,
    write_litgpt,
    takes=("alpha", "enabled", "heads", "kv_heads"),
    suffixes=(),
    directory=True,
    resolve={"litgpt": resolve_litgpt},
)
