"""Merging by way of the live model, where a checkpoint's names or ties do not say where an adapter's weights are."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lorakit.checkpoints.merging import CheckpointMergeReport, Verify, check_survival
from lorakit.checkpoints.opening import open_checkpoint
from lorakit.checkpoints.rewrite import WEIGHTS
from lorakit.checkpoints.staged import staged
from lorakit.errors import LorakitError
from lorakit.finetune.base import DTYPES, open_base, open_outline
from lorakit.finetune.generation.adapters import load_value
from lorakit.finetune.hub import snapshot
from lorakit.finetune.quiet import quiet_transformers
from lorakit.finetune.resolve import resolve
from lorakit.merge import MergedWeight
from lorakit.merge import merge as merge_model
from lorakit.storage import read_json_object
from lorakit.values.adapter import Adapter

_CONFIG, _TIES = "config.json", "tie_word_embeddings"


def checkpoint_at(where: str) -> Path:
    """The checkpoint that a word means: itself; the base of a run or of an adapter; a hub id's files.

    Raises:
        LorakitError: there is none, or a run or adapter that does not name its base.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return path
    found = resolve(where)
    path = Path(found.model).expanduser()
    if path.exists():
        return path
    return snapshot(found.model, found.settings.get("revision"))


def knows(base: Path, adapter: Adapter) -> bool:
    """Whether transformers builds a model of a directory that has every weight of an adapter; none are read."""
    if not (base / _CONFIG).is_file() or find_spec("transformers") is None:
        return False
    try:
        model = open_outline(base).model
    except LorakitError:
        return False
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return all(weight.name in names for weight in adapter.weights)


def merge_live(
    base: Path,
    adapter: Adapter,
    out: Path,
    *,
    scale: float,
    least_survival: float,
    verify: Verify,
    force: bool,
    files: Mapping[str, bytes] | None = None,
) -> tuple[CheckpointMergeReport, list[str]]:
    """Load a model with transformers, merge an adapter into it, and save it: W + scale·ΔW, rounded once.

    The whole model is in memory, in the dtype it is stored in, and the update of one weight in 32 bits. An output head
    that was tied to the embedding becomes a weight of its own, and config.json says so. The other files are the base's.

    Args:
        base: a directory of transformers.
        adapter: its names are those of the live model.
        out: the directory to write; it appears whole, or not at all.
        scale: the strength.
        least_survival: refuse if rounding leaves less than this share of an update.
        verify: "sample" compares fingerprints with those of the base of training; "off" does not.
        force: whether what is there may be replaced.
        files: other files by their names, in the place of the base's.

    Returns:
        What was done, and what is to be said.

    Raises:
        LorakitError: the base cannot be opened, the adapter does not fit, or the result may not be kept.
    """
    out = Path(os.path.abspath(out))
    model: Any = open_base(base, device="cpu", dtype=_dtype_of(base)).model
    loaded = load_value(model, adapter, verify=verify)
    norms = {weight.name: float(_norm(model, weight.name)) for weight in adapter.weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties and of rounding: both are said below
        report = merge_model(model, {loaded.name: scale})
    check_survival(report.weights, least_survival)
    left_out: list[str] = []
    with staged(out, force=force) as beside, quiet_transformers():
        target = beside / out.name
        model.save_pretrained(target, max_shard_size="5GB")
        for entry in sorted(base.iterdir()):
            if entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(WEIGHTS):
                shutil.copyfile(entry, target / entry.name)
            elif entry.name.startswith(".") or not entry.is_file():
                left_out.append(entry.name)
        if report.untied:
            (target / _CONFIG).write_bytes(_untied(base))
        for name, content in (files or {}).items():
            (target / name).write_bytes(content)
    said = ["the checkpoint has weights under other names, or tied, so the whole model was loaded to merge"]
    if report.untied:
        said.append(f"no longer tied: {', '.join(report.untied)}; config.json says so ({_TIES}: false)")
    if loaded.note is not None:
        said.append(loaded.note)
    lost, change = _shares(report.weights, norms)
    return CheckpointMergeReport(report.weights, lost, "", (), tuple(left_out), change), said


def _dtype_of(base: Path) -> str:
    """The dtype that the weights are stored in; of several the widest."""
    stored = {tensor.dtype for tensor in open_checkpoint(base, "the base").tensors.values()}
    kinds = {name: dtype for name, dtype in DTYPES.items() if dtype in stored}
    return next(iter(kinds)) if len(kinds) == 1 else "float32"


def _norm(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, parameter = name.rpartition(".")
    weight = model.get_submodule(path)._parameters[parameter]
    assert weight is not None
    norm: torch.Tensor = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    return norm


def _shares(weights: Iterable[MergedWeight], norms: Mapping[str, float]) -> tuple[float, float]:
    """Of all together: what was lost of the updates, and the updates beside the weights."""
    changes = {each.name: each.change * norms[each.name] for each in weights}
    lost = math.hypot(*(each.lost * changes[each.name] for each in weights))
    change, whole = math.hypot(*changes.values()), math.hypot(*norms.values())
    return lost / change if change else 0.0, change / whole if whole else 0.0


def _untied(base: Path) -> bytes:
    """The base's config, where nothing is tied: transformers would tie the head to the embedding again."""
    config = read_json_object(base / _CONFIG)
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        part[_TIES] = False
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
