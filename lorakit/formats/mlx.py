"""mlx-lm: `<layer>.lora_a` (in, r) and `.lora_b` (r, out), transposed; a config with one rank and one scale.

The scale is the factor itself, not alpha/r. Layers of experts, `switch_mlp`, have (E, r, in) and (E, out, r), which is
not transposed. `m` is DoRA's magnitude, (out,) of a linear layer.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.factors import (
    Part,
    adapter_of,
    fact_of,
    factor_problem,
    factors_of,
    grouped,
    one_rank,
    variant_of,
    whole_parts,
)
from lorakit.formats.form import Format, Known, Written, no_place
from lorakit.formats.names import Names, checked
from lorakit.safe import in_order
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import DoRA, Full
from lorakit.variants.checks import checked_number

_LATER = ("fine_tune_type", "num_layers")
"""Fields of configs (num_layers was lora_layers before) of versions that take the scale as it is, beside an alpha."""
_ENDINGS = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}


def read_mlx(content: Content, known: Known) -> Adapter:
    """What mlx-lm trained, with its config or without."""
    config = content.config or {}
    if config.get("fine_tune_type") == "full":
        return _whole(content)
    given = config.get("lora_parameters", config)
    given = given if isinstance(given, Mapping) else {}
    groups, others = grouped(content.tensors, _ENDINGS)
    problems: list[str] = []
    scale = _scale(content, given, known, problems)
    layouts = {path: _layout(path, found, given.get("rank"), problems) for path, found in groups.items()}
    ranks = {found["A"].shape[-2] for found in layouts.values() if found}
    if scale is None and known.alpha is not None and len(ranks) > 1:
        problems.append(f"its ranks are {sorted(ranks)}, so alpha= gives several scales: put a config beside it")
    parts = []
    for path, found in layouts.items():
        if found:
            rank = found["A"].shape[-2]
            alpha = known.alpha if scale is None else scale * rank
            variant = variant_of(path, problems, rank, alpha, given.get("dropout", 0.0), "magnitude" in found)
            parts.append(Part(path, variant, found))
    facts = {} if scale is None else {"mlx": {"scale": scale}}
    missing = ("alpha",) if scale is None and known.alpha is None else ()
    return adapter_of(content, "mlx", [*parts, *whole_parts(others)], problems, missing=missing, facts=facts)


def _scale(content: Content, given: Mapping[str, Any], known: Known, problems: list[str]) -> float | None:
    """The factor before the product; None if the file does not say it."""
    raw = given.get("scale")
    config = content.config or {}
    if raw is None or ("alpha" in given and not any(name in config for name in _LATER)):
        # Early versions multiplied with scale·alpha/rank; later ones have both in their configs, too, and use scale.
        return None
    if known.alpha is not None:
        problems.append(f"its config says its scale, {raw!r}: leave alpha= away")
    try:
        return checked_number("scale", raw, above=0)
    except LorakitError as error:
        problems.append(f"its config: {error}")
        return None


def _layout(path: str, found: Mapping[str, Tensor], rank: Any, problems: list[str]) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) of one layer, (E, r, in) and (E, out, r) of a stack; nothing if there is a problem."""
    b = found.get("B")
    stacked = b is not None and b.dim() == 3
    a = found.get("A")
    if stacked and b is not None and a is not None and a.dim() == 2 and b.shape[0] and not a.shape[0] % b.shape[0]:
        found = {**found, "A": a.unflatten(0, (b.shape[0], -1))}  # as the first versions had it
    problem = factor_problem(path, {k: v for k, v in found.items() if k != "magnitude"}, 3 if stacked else 2)
    if problem is not None:
        problems.append(problem)
        return {}
    A, B = found["A"], found["B"]
    if not stacked:
        A, B = A.mT, B.mT
    r = A.shape[-2]
    shapes = f"lora_a {tuple(found['A'].shape)}, lora_b {tuple(found['B'].shape)}"
    if r != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        problems.append(f"{path!r}: {shapes}: they have no rank in common")
    elif rank is not None and rank != r:
        problems.append(f"{path!r}: {shapes} are of rank {r}, and the config says {rank!r}")
    elif rank is None and r > max(A.shape[-1], B.shape[-2]):
        problems.append(f"{path!r}: {shapes}: they lie the other way round; mlx has (in, r) and (r, out)")
    else:
        tensors = {"A": A.contiguous(), "B": B.contiguous()}
        m = found.get("magnitude")
        if m is None:
            return tensors
        if not stacked and m.dtype.is_floating_point and m.shape == (B.shape[0],):
            return {**tensors, "magnitude": m}
        kind = "of an embedding, which is one for each of its rows" if m.shape == (A.shape[-1],) else "of a stack"
        problems.append(f"{path!r}: its magnitude of shape {tuple(m.shape)} is {kind}: there is no such variant here")
    return {}


def _whole(content: Content) -> Adapter:
    problems = [
        f"{key!r} has {tensor.dim()} axes: mlx orders those of a convolution in another way"
        for key, tensor in content.tensors.items()
        if tensor.dim() > 2
    ]
    return adapter_of(content, "mlx", whole_parts(content.tensors), problems)


def resolve_mlx(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The same in a model: a stack of experts that it has as modules of their own becomes one update for each.

    Raises:
        LorakitError: an update has no meaning for the layer of its name.
    """
    layers, problems = set(names.layers), list[str]()
    modules = {} if names.model is None else dict(names.model.named_modules())
    weights: list[AdapterWeight] = []
    for weight in adapter.weights:
        entry = weight.entry
        if isinstance(weight.variant, DoRA) and isinstance(modules.get(entry.path), nn.Embedding):
            problems.append(
                f"{weight.name!r}: mlx has the magnitudes of an embedding by its rows, which is not known here"
            )
        before, switch, own = entry.path.rpartition(".switch_mlp.")
        experts = [f"{before}.experts.{i}.{own}" for i in range(weight.tensors["A"].shape[0])] if switch else []
        if weight.stacked and entry.path not in layers and experts and layers.issuperset(experts):
            weights += [
                weight._replace(
                    entry=entry._replace(path=path), tensors={name: each[i] for name, each in weight.tensors.items()}
                )
                for i, path in enumerate(experts)
            ]
        else:
            weights.append(weight)
    return checked(adapter, weights, problems)


def write_mlx(adapter: Adapter, known: Known) -> Written:
    """A directory for `mlx_lm`: adapters.safetensors and adapter_config.json."""
    problems: list[str] = []
    lost: list[str] = []
    factors = factors_of(adapter, [] if _all_whole(adapter) else problems, lost, dora=True)
    lost = [each for each in lost if not each.startswith("dropout")]
    whole = [weight.name for weight in adapter.weights if isinstance(weight.variant, Full)]
    kinds = {isinstance(each.weight.variant, DoRA) for each in factors}
    if len(kinds) > 1:
        problems.append("some weights have magnitudes (DoRA) and others not; mlx has one kind for all")
    if whole:
        problems.append(f"{len(whole)} parameters are trained as a whole beside others, {whole[0]!r} the first")
    if not factors and not problems:
        problems.append("no layer has low-rank factors")
    drops = {getattr(each.weight.variant, "dropout", 0.0) for each in factors}
    if len(drops) > 1:
        lost.append(f"several dropouts, {', '.join(map(str, sorted(drops)))}: the largest is written")
    tensors: dict[str, Tensor] = {}
    for each in factors:
        if each.weight.lookup and isinstance(each.weight.variant, DoRA):
            problems.append(f"{each.weight.name!r}: mlx has other magnitudes of an embedding")
        if each.A.dim() > 2 and not each.weight.stacked:
            problems.append(f"{each.weight.name!r}: mlx-lm has no LoRA of convolutions")
    no_place("mlx", problems)
    alpha, rank, factors = one_rank(factors, lost)
    for each in factors:
        turned = (each.A, each.B) if each.weight.stacked else (each.A.mT, each.B.mT)
        tensors |= {f"{each.path}.lora_a": turned[0], f"{each.path}.lora_b": turned[1]}
        if "magnitude" in each.weight.tensors:
            tensors[f"{each.path}.m"] = each.weight.tensors["magnitude"].detach().reshape(-1)
    config = {
        "fine_tune_type": "dora" if True in kinds else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": _written_scale(adapter, alpha, rank),
            "dropout": max(drops),
            "keys": list(dict.fromkeys(_key(each.path) for each in factors)),
        },
    }
    content = in_order({key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()})
    files = {"adapters.safetensors": content, "adapter_config.json": json.dumps(config, indent=2).encode()}
    return Written(files, tuple(lost))


def _all_whole(adapter: Adapter) -> bool:
    return all(isinstance(weight.variant, Full) for weight in adapter.weights)


def _written_scale(adapter: Adapter, alpha: float, rank: int) -> float:
    """Alpha/rank; the number that was read if that is what it stands for, to the bit."""
    read = fact_of(adapter, "mlx").get("scale")
    return read if isinstance(read, int | float) and read * rank == alpha else alpha / rank


def _key(path: str) -> str:
    """The name within a block, which mlx-lm looks for in each of them; what it finds beyond has B = 0 and no effect."""
    words = path.split(".")
    number = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return path if number is None else ".".join(words[number + 1 :])


def _is_mlx(content: Content) -> bool:
    if content.container == "gguf" or "lorakit" in content.metadata:
        return False
    named = any(key.endswith((".lora_a", ".lora_b")) for key in content.tensors)
    return named or (
        content.file.name.startswith("adapters.") and (content.config or {}).get("fine_tune_type") == "full"
    )


MLX = Format(
    "mlx",
    "mlx-lm",
    _is_mlx,
    read_mlx,
    write_mlx,
    takes=("alpha",),
    suffixes=(),
    directory=True,
    resolve={"": resolve_mlx},
)
