"""Batches: examples of different lengths as tensors of one shape."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.finetune.data.examples import Example
from lorakit.finetune.data.packing import Packed

NO_LABEL = -100
"""The label that torch's cross-entropy leaves out."""


def collate(
    examples: Sequence[Example] | Sequence[Packed], pad_id: int, *, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """A batch, filled up on the right; every tensor is int64 of shape (examples, longest).

    Of examples: `input_ids`, `attention_mask` (always, also where nothing is filled up) and `labels`, -100 where a
    token is not trained on. Of packed rows `position_ids` are in the place of the mask: they begin anew with each
    example, and with what a row is filled up with, and transformers keeps apart what they part. That holds without a
    cache only: call the model with `use_cache=False` (transformers' Trainer does).

    Args:
        examples: all of one sort.
        pad_id: the token to fill up with.
        pad_to_multiple_of: make the shape's last axis a multiple of this: 8 suits tensor cores.

    Raises:
        LorakitError: there are no examples, or of both sorts.
    """
    if not examples:
        raise LorakitError("a batch of no examples: there is nothing to collate")
    rows: list[Example | Packed] = list(examples)
    packed = isinstance(rows[0], Packed)
    if any(isinstance(example, Packed) is not packed for example in rows):
        raise LorakitError("a batch is of examples or of packed rows, not of both: pack all or none")
    multiple = pad_to_multiple_of or 1
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full_like(ids, NO_LABEL)
    third = np.zeros_like(ids)
    for row, example in enumerate(rows):
        n = len(example)
        ids[row, :n] = own = example.ids
        labels[row, :n] = np.where(example.mask, own, NO_LABEL)
        if isinstance(example, Packed):
            third[row, :n] = example.positions
            third[row, n:] = np.arange(width - n)
        else:
            third[row, :n] = 1
    name = "position_ids" if packed else "attention_mask"
    return {name: torch.from_numpy(each) for name, each in (("input_ids", ids), (name, third), ("labels", labels))}
