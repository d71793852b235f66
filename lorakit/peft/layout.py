"""Where PEFT has what does not go by a layer's name: factors of parameters, and biases of layers that have factors.

A parameter of a module, two axes (d, k) or a stack (E, d, k), is what PEFT calls a target parameter. It wraps the
module once for each, in the order in which the module declares them: the first lies deepest, at
`<module>.base_layer.lora_A`, the last at `<module>.lora_A`. The factors of a stack are two matrices there:

    A (E·r, k) with an expert's rows together, B (d, r·E) with a rank's columns together

and of a module that multiplies by its parameter from the right (`is_transposed`, weights (E, in, out)) their A is made
of our B, and their B of our A, since theirs go by inputs and outputs and ours by rows and columns.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.header import PREFIX, Header, WeightEntry, file_key
from lorakit.layers import Parameter
from lorakit.variants import Full, Rows, Variant

A_KEY, B_KEY = "lora_A.weight", "lora_B.weight"
WRAPPED = ".base_layer"


class Placed(NamedTuple):
    """A parameter's place in PEFT's files."""

    place: str
    """The module that PEFT has its factors in."""
    experts: int | None
    """E of a stack; None of a matrix."""
    transposed: bool


def placed(header: Header) -> dict[str, Placed]:
    """The weights that PEFT has as target parameters, by name: plain LoRA of a parameter whose place is known."""
    groups: dict[str, list[WeightEntry]] = {}
    taken = set()
    for entry in header.weights:
        if _has_place(entry, header.variant_of(entry)):
            groups.setdefault(entry.path, []).append(entry)
        elif entry.parameter == "weight":
            taken.add(entry.path)
    found = {}
    for path, group in groups.items():
        if path in taken:  # the layer's own factors are there
            continue
        for depth, entry in enumerate(sorted(group, key=lambda entry: entry.order or 0, reverse=True)):
            count = entry.shape[0] if entry.shape is not None and len(entry.shape) == 3 else None
            found[entry.name] = Placed(path + WRAPPED * depth, count, entry.transposed and count is not None)
    return found


def _has_place(entry: WeightEntry, variant: Variant) -> bool:
    if entry.kind != Parameter.__name__ or entry.order is None or len(entry.shape or ()) not in (2, 3):
        return False
    fields = variant.peft_fields()
    return fields["peft_type"] == "LORA" and not fields.get("use_dora") and "A" in variant.file_names


def inner_biases(header: Header) -> dict[str, str]:
    """The biases that are trained as a whole on layers that have factors: their keys here, and PEFT's."""
    paths = {e.path for e in header.weights if e.parameter == "bias" and isinstance(header.variant_of(e), Full)}
    if not paths:
        return {}
    places, adapted = placed(header), set()
    for entry in header.weights:
        variant = header.variant_of(entry)
        thin = entry.parameter == "weight" and entry.path and not isinstance(variant, Full | Rows)
        if thin and entry.name not in places and variant.peft_fields()["peft_type"] == "LORA":
            adapted.add(entry.path)
    return {f"{PREFIX}{path}.bias": f"{PREFIX}{path}{WRAPPED}.bias" for path in sorted(paths & adapted)}


def to_peft(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's keys and in its layout, from those that `file_key` names."""
    left = dict(tensors)
    moved: dict[str, Tensor] = {}
    places = placed(header)
    for entry in header.weights:
        if entry.name not in places:
            continue
        place, count, transposed = places[entry.name]
        A, B = (left.pop(file_key(entry.path, entry.parameter, key, False)) for key in (A_KEY, B_KEY))
        if count is not None:
            A, B = flattened(A, B, transposed)
        moved |= {f"{PREFIX}{place}.{A_KEY}": A, f"{PREFIX}{place}.{B_KEY}": B}
    for ours, theirs in inner_biases(header).items():
        if ours in left:
            moved[theirs] = left.pop(ours)
    return {**left, **moved}


def from_peft(header: Header, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft`. What is missing stays missing.

    Raises:
        LorakitError: factors of a stack whose shapes cannot be those of one; `where` names the file.
    """
    left = dict(tensors)
    moved: dict[str, Tensor] = {}
    places = placed(header)
    for entry in header.weights:
        if entry.name not in places:
            continue
        place, count, transposed = places[entry.name]
        A, B = (left.pop(f"{PREFIX}{place}.{key}", None) for key in (A_KEY, B_KEY))
        if count is not None and A is not None and B is not None:
            try:
                A, B = stacked(A, B, count, transposed)
            except LorakitError as error:
                raise LorakitError(f"{where}: {entry.name!r}: {error}") from None
        for key, factor in ((A_KEY, A), (B_KEY, B)):
            if factor is not None:
                moved[file_key(entry.path, entry.parameter, key, False)] = factor
    for ours, theirs in inner_biases(header).items():
        if theirs in left:
            moved[ours] = left.pop(theirs)
    return {**left, **moved}


def flattened(A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """PEFT's two matrices of a stack: (E·r, in) and (out, r·E), from A (E, r, k) and B (E, d, r)."""
    if transposed:
        A, B = B.mT, A.mT
    return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


def stacked(A: Tensor, B: Tensor, count: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """The factors of a stack, A (E, r, k) and B (E, d, r), from PEFT's two matrices (E·r, in) and (out, r·E).

    Raises:
        LorakitError: they are no matrices of one rank for each of E.
    """
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
    if not fits or count < 1 or A.shape[0] % count or not A.shape[0]:
        raise LorakitError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no factors of a stack of {count}")
    A = A.unflatten(0, (count, -1))
    B = B.unflatten(1, (-1, count)).permute(2, 0, 1)
    if transposed:
        A, B = B.mT, A.mT
    return A.contiguous(), B.contiguous()
