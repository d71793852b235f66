"""An adapter as a value: its weights and their tensors, without a model."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lorakit.algebra.low_rank import concatenate, recompress
from lorakit.errors import LorakitError
from lorakit.header import LOOKUP_NAMES, Header, WeightEntry, file_key
from lorakit.patterns import some
from lorakit.values.weight import AdapterWeight, incomplete
from lorakit.variants import Full, Rows, Variant

_MANY = 8
"""Weights with one and the same problem that are listed one by one."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is known of an adapter without a model: `read` makes one from a file, `adapter_value` from a live model.

    It never changes. Its tensors may be those of a live model: they follow when that is trained.
    """

    name: str
    variant: Variant
    """What most weights have; `weights` says what each has."""
    weights: tuple[AdapterWeight, ...]
    format: str = "lorakit"
    """The format of the file it came from."""
    ours: bool = True
    """Whether lorakit trained it: others compute in 32 bits with tensors that their files hold in 16."""
    missing: tuple[str, ...] = ()
    """What the format does not hold and was not given: the arguments of `read` that say it, such as "alpha"."""
    naming: str = ""
    """In which way names are not those of a model's layers: "kohya" has them flattened. "" if they are those."""
    left_out: tuple[str, ...] = ()
    """What the file holds beside the adapter, and is not in this value."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, as JSON has it: "base" is the name of the model it was trained on."""

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, Tensor], where: str, **more: Any) -> "Adapter":
        """The adapter that a header and tensors under the keys of PEFT's files make up.

        Raises:
            LorakitError: tensors are missing or left over; `where` names the file.
        """
        left = dict(tensors)
        weights = tuple(_gathered(header, entry, left) for entry in header.weights)
        problems = [problem for weight in weights if (problem := incomplete(weight)) is not None]
        problems += [f"it holds {key!r}, which is no part of it" for key in left]
        if not weights:
            problems.append("it adapts no weight")
        check(where, problems)
        return cls(header.name, header.variant, weights, ours=header.ours, facts=header.facts, **more)

    @property
    def header(self) -> Header:
        """What a file says about it."""
        entries = (
            weight.entry._replace(variant=None if weight.variant == self.variant else weight.variant)
            for weight in self.weights
        )
        return Header(self.name, self.variant, tuple(entries), self.ours, self.facts)

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors under the keys of PEFT's files."""
        return {
            file_key(weight.entry.path, weight.entry.parameter, weight.variant.file_names[name], weight.lookup): tensor
            for weight in self.weights
            for name, tensor in weight.tensors.items()
        }

    def with_weights(self, weights: Iterable[AdapterWeight], **changes: Any) -> "Adapter":
        """The same adapter with other weights, and other fields if they are named."""
        return replace(self, weights=tuple(weights), **changes)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for weight in self.weights for tensor in weight.tensors.values())

    def __add__(self, other: "Adapter") -> "Adapter":
        """ΔW of both together, exactly: a new adapter whose factors are theirs side by side."""
        return weighted_sum([(self, 1.0), (other, 1.0)]) if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: "Adapter") -> "Adapter":
        """ΔW of this one less that of the other."""
        return weighted_sum([(self, 1.0), (other, -1.0)]) if isinstance(other, Adapter) else NotImplemented

    def __mul__(self, factor: float) -> "Adapter":
        """Factor·ΔW."""
        return weighted_sum([(self, factor)]) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "Adapter":
        """−ΔW: what the adapter does, undone."""
        return weighted_sum([(self, -1.0)])

    def __repr__(self) -> str:
        return (
            f"Adapter({self.name!r}, {self.variant}, {len(self.weights)} weights, {self.parameters:,} numbers, "
            f"format={self.format!r})"
        )


def check(where: str, problems: Iterable[str]) -> None:
    """One error that lists all problems, if there are any.

    Raises:
        LorakitError: there are.
    """
    listed = "".join(f"\n  - {problem}" for problem in _grouped(problems))
    if listed:
        raise LorakitError(f"{where} is no adapter that can be used:{listed}")


def _grouped(problems: Iterable[str]) -> list[str]:
    """The same, with one line for all weights of which the same is said, if they are many."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        name, colon, reason = problem.partition("': ")
        groups.setdefault(reason if colon and name.startswith("'") else problem, []).append((name[1:], problem))
    lines: list[str] = []
    for reason, group in groups.items():
        names = [name for name, _ in group]
        lines += [f"{some(names)}: {reason}"] if len(group) > _MANY else [problem for _, problem in group]
    return lines


def check_known(adapter: Adapter) -> None:
    """Whether all is known that ΔW depends on.

    Raises:
        LorakitError: the file does not hold something, and it was not given.
    """
    if adapter.missing:
        what = ", ".join(f"{name}=..." for name in adapter.missing)
        raise LorakitError(
            f"{adapter.name!r} was read from a file of {adapter.format}, which does not hold its "
            f"{' and '.join(adapter.missing)}, and it is never guessed: give {what}"
        )


def weighted_sum(terms: Mapping[Adapter, float] | Iterable[tuple[Adapter, float]], name: str | None = None) -> Adapter:
    """Σ weight·ΔW of adapters as a new one, exactly: their factors side by side, scales and weights in B.

    B·A is never formed. What does not adapt a weight counts as zero there. With one adapter and a weight of 1, its own
    tensors are kept, whatever its method; else ΔW must be a product of two thin factors. Dropout is not kept.

    Args:
        terms: {adapter: weight}, or pairs of them: {a: 0.7, b: -0.3}.
        name: of the new adapter; by default that of the first.

    Raises:
        LorakitError: nothing to add, a scale that is not known, a weight that is not finite, products that do not have
            one shape, or adapters of different bases: all of it in one error.
    """
    factors: dict[Adapter, float] = {}
    for adapter, factor in terms.items() if isinstance(terms, Mapping) else terms:
        check_known(adapter)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise LorakitError(f"the weight of {adapter.name!r} is {factor!r}; it must be a finite number")
        factors[adapter] = factors.get(adapter, 0.0) + float(factor)
    if not factors:
        raise LorakitError("nothing to add: give adapters, with weights")
    acting = {adapter: factor for adapter, factor in factors.items() if factor} or dict([next(iter(factors.items()))])
    first = next(iter(acting))
    if len(acting) == 1 and acting[first] == 1:
        return replace(first, name=first.name if name is None else name)
    where: dict[str, list[tuple[AdapterWeight, float]]] = {}
    for adapter, factor in acting.items():
        for weight in adapter.weights:
            where.setdefault(weight.name, []).append((weight, factor))
    problems = [f"{a.name!r} has names as {a.naming or 'a model'} has them" for a in acting if a.naming != first.naming]
    problems += [problem for found in where.values() for problem in unlike([weight for weight, _ in found])]
    weights = []
    for found in [] if problems else where.values():
        try:
            weights.append(summed(found))
        except LorakitError as error:
            problems.append(str(error))
    check(f"the sum of {', '.join(repr(adapter.name) for adapter in acting)}", problems)
    return first.with_weights(
        weights,
        name=first.name if name is None else name,
        variant=usual(weights),
        format="lorakit",
        ours=all(adapter.ours for adapter in acting),
        left_out=tuple(what for adapter in acting for what in adapter.left_out),
    )


def unlike(weights: list[AdapterWeight]) -> list[str]:
    """Why what several adapters do to one weight cannot be added up."""
    found = []
    first = weights[0].entry
    for field_name in ("slices", "kind", "shape", "sample"):
        values = {getattr(weight.entry, field_name) for weight in weights} - {None}
        if len(values) > 1:
            seen = " and ".join(sorted(map(str, values)))
            what = "was adapted on different bases" if field_name == "sample" else f"has a {field_name} of {seen}"
            found.append(f"{first.name!r} {what}")
    return found


def summed(terms: list[tuple[AdapterWeight, float]]) -> AdapterWeight:
    """The sum in one weight."""
    (first, factor), *others = terms
    if not others and factor == 1:
        return first
    pairs, inner = [weight.update() for weight, _ in terms], 2 if first.stacked else 1
    B, A = concatenate(pairs, [factor for _, factor in terms])
    if B.shape[inner] > min(B.shape[-2], A.shape[-1]):  # a sum of many ranks has no more than the matrix
        B, A, _, _ = recompress(B, A)
    return first.with_factors(B, A)


def usual(weights: Iterable[AdapterWeight]) -> Variant:
    """The variant that most weights have, of those that have factors if any do."""
    counts = Counter(weight.variant for weight in weights)
    thin = {variant: n for variant, n in counts.items() if not isinstance(variant, Full | Rows)} or counts
    return max(thin, key=lambda variant: thin[variant])


def _gathered(header: Header, entry: WeightEntry, left: dict[str, Tensor]) -> AdapterWeight:
    """A weight with its tensors, taken out of those that are left."""
    variant, found, lookup = header.variant_of(entry), {}, False
    for name, file_name in variant.file_names.items():
        for looked_up in (False, True):
            value = left.pop(file_key(entry.path, entry.parameter, file_name, looked_up), None)
            if value is not None:
                found[name] = value
                lookup = lookup or (looked_up and file_name in LOOKUP_NAMES)
    if lookup and entry.kind is None:
        entry = entry._replace(kind="Embedding")
    return AdapterWeight(entry, variant, found)
