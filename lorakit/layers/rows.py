"""An adapter for each row of a batch."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.layers.adapters import AdaptedWeight
from lorakit.layers.kind import CalledKind, Inputs


def by_row(layer: nn.Module, adapted: AdaptedWeight, inputs: Inputs, base: Tensor, y: Tensor) -> Tensor:
    """The output y with the update of each row's adapter; rows of the base alone stay as they are to the bit.

    Each adapter computes its own rows alone, if all inputs have that axis.
    """
    names = adapted.selection.rows
    assert names is not None
    acting = [name for name in dict.fromkeys(names) if name is not None and name in adapted and adapted[name].enabled]
    if not acting:
        return y
    kind = cast(CalledKind, adapted[acting[0]].kind)
    if not kind.has_rows(layer, base) or base.shape[0] != len(names):
        raise LorakitError(
            f"a {type(layer).__name__} returned {tuple(base.shape)}, where per_row was given {len(names)} rows: its "
            "first axis must be the batch; run each adapter's rows apart with active(...)"
        )
    for name in acting:
        update = adapted[name]
        index = torch.tensor([i for i, each in enumerate(names) if each == name], device=y.device)
        if _sliceable(inputs, len(names)):
            mine = tuple(x.index_select(0, index) if isinstance(x, Tensor) else x for x in inputs)
            part = update.beside(layer, mine, base.index_select(0, index), y.index_select(0, index), 1.0)
        else:  # bags of a flat list of indices: all rows, of which its own are taken
            part = update.beside(layer, inputs, base, y, 1.0).index_select(0, index)
        y = y.index_copy(0, index, part)
    return y


def _sliceable(inputs: tuple[Any, ...], rows: int) -> bool:
    """Whether every input can be cut along the batch. A flat list of indices cannot, whatever its length."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return all(x.dim() > 1 and x.shape[0] == rows for x in tensors)
