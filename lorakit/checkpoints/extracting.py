"""What fine-tuning did, as an adapter: the difference of two checkpoints, each matrix at a low rank."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.algebra import approximate
from lorakit.algebra.low_rank import check_bounds
from lorakit.checkpoints.checkpoint import Checkpoint, give_back, listed, same
from lorakit.checkpoints.extracted import ExtractedWeight, ExtractReport
from lorakit.checkpoints.onto import TIED, is_tied
from lorakit.checkpoints.opening import Source, open_checkpoint
from lorakit.checkpoints.rewrite import Progress
from lorakit.checkpoints.seen import Seen, is_embedding, seen
from lorakit.errors import LorakitError
from lorakit.header import WeightEntry
from lorakit.layers import Kind, accumulation_dtype
from lorakit.patterns import Pattern, by_name, patterns_of, some
from lorakit.tables import shape as shown
from lorakit.values.adapter import Adapter
from lorakit.values.weight import AdapterWeight
from lorakit.variants import Full, LoRA, Variant

_BLOCK = 2**20
"""Numbers that are widened at a time."""


def extract(
    base: Source,
    tuned: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: Pattern | Sequence[Pattern] | None = None,
    name: str = "extracted",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Adapter, ExtractReport]:
    """The adapter that makes a tuned checkpoint of its base: LoRA of each matrix that changed, whole what is no matrix.

    ΔW = tuned − base is formed in at least 32 bits, one tensor at a time, and split by its singular value
    decomposition; at small ranks of large matrices by a randomized one, whose error is measured. Given no bound, the
    rank is the numerical one: nothing is lost, and after full fine-tuning it may be all that there is.

    A weight is seen as the layer of a live model sees it, if one of the two is given as an `nn.Module`; else by its
    name and shape: two axes are a linear layer's (out, in), unless its name is that of an embedding or its bias shows
    that it is (in, out); three or more are a convolution's if it is called "weight", else a stack of matrices.

    Args:
        base: a path, a mapping of tensors, or a module.
        tuned: the same after training, with the same names.
        rank: at most so many for each weight.
        energy: the smallest rank that holds this share of ‖ΔW‖² in each weight, from 0 to 1.
        error: the smallest rank with at most this relative error in each weight. Several bounds: the smallest rank.
        targets: names, globs or regular expressions of layers or parameters; by default all that changed.
        name: what the adapter is called.
        seed: of the randomized decomposition.
        progress: called with the bytes done, the bytes of all, and the name of the tensor that is next.

    Returns:
        The adapter, in memory and with fingerprints of the base; and the report of each weight's rank and error, and of
        what is not captured.

    Raises:
        LorakitError: a checkpoint is damaged, nothing changed that can be captured, or values are not finite.
    """
    check_bounds(rank, energy, error)
    one, other = _both_names(open_checkpoint(base, "the base"), open_checkpoint(tuned, "the tuned checkpoint"))
    ways = seen(one, one.model if one.model is not None else other.model)
    missed = [(each, "is in the base alone") for each in one if each not in other]
    missed += [(each, "is in the tuned checkpoint alone") for each in other if each not in one]
    common = [each for each in one if each in other]
    chosen = _chosen(common, targets)
    total, done, unchanged = sum(one[each].bytes for each in common), 0, 0
    weights, rows, problems = [], [], []
    for each in common:
        if progress is not None:
            progress(done, total, each)
        done += one[each].bytes
        way = ways[each]
        differ = _differ(one, other, each)
        if differ is None and _unchanged(one, other, each):
            unchanged += 1
            continue
        why = differ or _no_part(one, each, way) or ("changed, and is not in targets" if each not in chosen else None)
        if why is not None:
            missed.append((each, why))
            continue
        assert isinstance(way, Seen)
        try:
            found = _extracted(one, other, each, way, (rank, energy, error), seed)
        except LorakitError as problem:
            problems.append(f"{each!r}: {problem}")
            continue
        give_back()
        if found is None:
            unchanged += 1  # in how zeros are signed, say
        else:
            weights.append(found[0])
            rows.append(found[1])
    if progress is not None:
        progress(total, total, "")
    if problems:
        raise LorakitError(listed(f"cannot extract an adapter from {one.where} and {other.where}:", problems))
    if not weights:
        raise LorakitError(
            listed(
                f"nothing changed from {one.where} to {other.where} that an adapter could hold; {unchanged} tensors "
                f"are the same{', and:' if missed else ''}",
                [f"{each!r} {why}" for each, why in missed],
            )
        )
    tied = [weight.name for weight in weights if is_embedding(weight.name) and is_tied(weight.name, one)]
    missed += [
        (
            each,
            "is the output head too, which changes with it in the tuned checkpoint and in merge_checkpoint, but not on "
            "a live model: give the model itself as the base to have both",
        )
        for each in tied
    ]
    adapter = Adapter(name, _usual(weights), tuple(weights), facts={TIED: tied} if tied else {})
    mixed = sum(one[row.name].dtype != other[row.name].dtype for row in rows)
    return adapter, ExtractReport(tuple(rows), unchanged, mixed, tuple(missed))


def _both_names(one: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both with what one holds under two names that are tied, and the other, a file, stored under one of them."""

    def filled(short: Checkpoint, long: Checkpoint) -> Checkpoint:
        if long.model is None:
            return short
        added = {
            name: next((tied for tied in long.tied(name) if tied in short), None) for name in long if name not in short
        }
        kept = {name: tied for name, tied in added.items() if tied is not None}
        tensors = {**short.tensors, **{name: short[tied] for name, tied in kept.items()}}
        memory = {**short.memory, **{name: short.memory[tied] for name, tied in kept.items() if tied in short.memory}}
        return replace(short, tensors=tensors, memory=memory)

    return filled(one, other), filled(other, one)


def _chosen(names: list[str], targets: Pattern | Sequence[Pattern] | None) -> set[str]:
    """The names that the patterns select, of the parameter itself or of its layer."""
    if targets is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns_of(targets, "targets"):
        test = by_name(pattern)
        if test is None:
            raise LorakitError(f"targets holds {pattern!r}: of a checkpoint there are names alone; give names or globs")
        hits = {name for name in names if test(name) or test(name.rpartition(".")[0])}
        if not hits:
            raise LorakitError(f"the target {pattern!r} matches no tensor; there are {some(names)}")
        chosen |= hits
    return chosen


def _differ(one: Checkpoint, other: Checkpoint, name: str) -> str | None:
    a, b = one[name], other[name]
    if a.shape != b.shape:
        return f"is {shown(a.shape)} in the base and {shown(b.shape)} in the tuned checkpoint"
    floats = all(each.dtype.is_floating_point and each.dtype.itemsize >= 2 for each in (a, b))
    if a.dtype == b.dtype or floats:
        return None
    return f"is {a.dtype} in the base and {b.dtype} in the tuned checkpoint"


def _unchanged(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether both have the same values, or one has those of the other rounded to its dtype."""
    if one[name].dtype == other[name].dtype:
        return same(one, other, name)
    a, b = one.read(name), other.read(name)
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))


def _no_part(checkpoint: Checkpoint, name: str, way: Seen | str) -> str | None:
    dtype = checkpoint[name].dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return f"changed, and is {dtype}"
    return f"changed, and {way}" if isinstance(way, str) else None


@torch.no_grad()
def _extracted(
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    way: Seen,
    bounds: tuple[int | None, float | None, float | None],
    seed: int,
) -> tuple[AdapterWeight, ExtractedWeight] | None:
    """What one weight gets; None if it has not changed."""
    stored, kind = base[name], way.kind
    path, _, parameter = name.rpartition(".")
    how = (stored.shape, str(stored.dtype).removeprefix("torch."), base.fingerprint(name))
    entry = WeightEntry(path, parameter, None, *how)
    if kind is None:
        value = tuned.read(name).to(accumulation_dtype(torch.promote_types(stored.dtype, tuned[name].dtype)))
        change = _norm(value - base.read(name))
        if not math.isfinite(change):
            raise LorakitError("it holds NaN or infinity")
        row = ExtractedWeight(name, "whole", way.by, stored.shape, 0, change, 0.0)
        entry = entry._replace(kind="Parameter")
        return (AdapterWeight(entry, Full(), {"value": value}), row) if change else None
    delta = _difference(base, tuned, name)
    change = _norm(delta)
    if not math.isfinite(change):
        raise LorakitError("it holds NaN or infinity, or a change too large for its dtype")
    if change == 0:
        return None
    B, A, left = _factors(kind, delta, bounds, seed)
    r = A.shape[-2]
    a_shape, b_shape = kind.factor_shapes(torch.empty(stored.shape, device="meta"), r)
    entry = entry._replace(slices=kind.slices, kind=type(kind).__name__, padding_idx=kind.padding_idx)
    weight = AdapterWeight(entry, LoRA(rank=r), {"A": A.reshape(a_shape), "B": B.reshape(b_shape)})
    return weight, ExtractedWeight(name, kind.name, way.by, stored.shape, r, change, left / change)


def _difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Tensor:
    """ΔW in at least 32 bits, with no more in memory than itself and one of the two."""
    dtype = accumulation_dtype(torch.promote_types(base[name].dtype, tuned[name].dtype))
    delta = tuned.read(name).to(dtype)
    flat, other = delta.view(-1), base.read(name).view(-1)
    wide = torch.empty(min(_BLOCK, len(flat)), dtype=dtype)
    for i in range(0, len(flat), _BLOCK):
        part = flat[i : i + _BLOCK]
        part -= wide[: len(part)].copy_(other[i : i + _BLOCK])
    return delta


def _factors(
    kind: Kind, delta: Tensor, bounds: tuple[int | None, float | None, float | None], seed: int
) -> tuple[Tensor, Tensor, float]:
    """B and A as matrices, of a stack one below the other with one rank for all; and ‖ΔW − B·A‖."""
    matrix, padding = kind.matrix_of(delta), 0.0
    if kind.padding_idx is not None:  # no update changes it
        column = matrix[:, kind.padding_idx]
        padding = _norm(column)
        column.zero_()
    rank, energy, error = bounds
    stack = matrix if matrix.dim() == 3 else matrix[None]
    parts = [approximate(part, rank, energy=energy, error=error, seed=seed) for part in stack]
    most = max(part.A.shape[0] for part in parts)
    Bs = [torch.nn.functional.pad(part.B, (0, most - part.B.shape[1])) for part in parts]
    As = [torch.nn.functional.pad(part.A, (0, 0, 0, most - part.A.shape[0])) for part in parts]
    B, A = (torch.stack(Bs), torch.stack(As)) if matrix.dim() == 3 else (Bs[0], As[0])
    return B, A, math.hypot(padding, *(part.error for part in parts))


def _usual(weights: list[AdapterWeight]) -> Variant:
    """The variant that most weights have, of those with a rank if there is one."""
    counts = Counter(weight.variant for weight in weights if isinstance(weight.variant, LoRA))
    return counts.most_common(1)[0][0] if counts else Full()


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))
