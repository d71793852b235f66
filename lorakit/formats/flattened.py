"""Names that were flattened, every dot an underscore, found again among a model's."""

import difflib
import math
from collections.abc import Iterable, Mapping

from lorakit.formats.image import matrix_shape
from lorakit.formats.ldm import as_diffusers
from lorakit.formats.names import Names
from lorakit.values.weight import AdapterWeight

_NEAREST = 8
"""For how many names that fit nothing the nearest ones are looked for: each is compared with all of the model's."""
_LONGEST = 300
_ROOT = "text_model_"
"""What encoders of CLIP have, or had, before the names of their layers."""


def flatten(name: str) -> str:
    """A layer's name as such files have it."""
    return name.replace(".", "_")


def fitting_names(mine: Mapping[str, AdapterWeight], names: Names, problems: list[str]) -> dict[str, str]:
    """Flattened name → the layer's; of those that fit none, or several, the problems say so."""
    table: dict[str, list[str]] = {}
    for parameter in names.shapes:
        layer, _, own = parameter.rpartition(".")
        if own == "weight":
            table.setdefault(flatten(layer), []).append(layer)
    spellings = _spelling(mine, table)
    found: dict[str, str] = {}
    for rest, weight in mine.items():
        layers = table.get(spellings[rest], [])
        if len(layers) > 1:  # "a.b_c" and "a_b.c"
            layers = [layer for layer in layers if _fits(weight, names.shapes[f"{layer}.weight"])]
            if len(layers) != 1:
                all_of_it = ", ".join(map(repr, table[spellings[rest]]))
                problems.append(f"{weight.entry.path!r} may be any of {all_of_it}, and shapes do not tell them apart")
                continue
        if layers:
            found[rest] = layers[0]
            continue
        near = _near(spellings[rest], table) if len(problems) < _NEAREST else []
        nearest = ", ".join(repr(layer) for name in near for layer in table[name])
        problems.append(f"{weight.entry.path!r} fits no layer" + (f"; the nearest are {nearest}" if nearest else ""))
    return found


def _near(name: str, table: Mapping[str, object]) -> list[str]:
    """Names like this one; of a longer one than any, from a damaged file, nothing is looked for."""
    return difflib.get_close_matches(name, table, n=3, cutoff=0.6) if len(name) <= _LONGEST else []


def _spelling(mine: Iterable[str], table: Mapping[str, object]) -> dict[str, str]:
    """How the model spells the names: as they are, with another root, or as diffusers has those of the original UNet.

    One way is taken for all of them: the first that no other surpasses.
    """
    names = list(mine)
    ways = [
        {name: name for name in names},
        {name: name.removeprefix(_ROOT) for name in names},
        {name: _ROOT + name for name in names},
        {name: as_diffusers(name, table) or name for name in names},
    ]
    return max(ways, key=lambda way: sum(name in table for name in way.values()))


def _fits(weight: AdapterWeight, shape: tuple[int, ...] | None) -> bool:
    """Whether an adapter's tensors are for a weight of this shape, or its transpose, as far as is known."""
    wanted = matrix_shape(weight)
    if shape is None or wanted is None:
        return True
    d, k = wanted
    return math.prod(shape) == d * k and (shape[0] == d or (len(shape) == 2 and shape[1] == d))
