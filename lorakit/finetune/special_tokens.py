"""The tokenizer's end of text and pad token, as far as the model knows them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import LorakitError

_SAME = 1e-3
"""Rows that are nearer than this to each other, relative to their norm, are one to the model."""


def complete(tokenizer: Any, model: Any, where: Path | None = None) -> str | None:
    """Give the tokenizer an end of text that the model can write, and a pad token, which is always masked.

    The tokens are ones that it has: the embedding never grows.

    Args:
        tokenizer: what is changed.
        model: the base, maybe on `meta`.
        where: its directory, to read the output embedding of a model on `meta` from.

    Returns:
        What is to be said of the end of text; None if it is as the tokenizer has it.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= size:
        tokenizer.eos_token = None  # a class of tokenizers may add one that this model never had
        stated = getattr(model.generation_config, "eos_token_id", None) or getattr(model.config, "eos_token_id", None)
        number = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(number, int) and 0 <= number < min(size, len(tokenizer)):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        candidates = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
        number = next(id for id in candidates if id is not None and id < size)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
    return _with_known_end(tokenizer, _output_rows(model, where))


def _with_known_end(tokenizer: Any, rows: Tensor | None) -> str | None:
    """Replace an end of text whose logit is always that of other tokens: what is trained to end would never end.

    Tokens that training never saw may be left with one common row. A model whose training had texts parted by the token
    that they begin with ends them so.
    """
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if rows is None or end is None or end >= len(rows):
        return None
    alike = _alike(rows, end)
    if not alike:
        return None
    said = f"the end of text {tokenizer.eos_token!r} was never trained: to this model it is {alike} other tokens too"
    if begin is None or begin in (end, tokenizer.pad_token_id) or begin >= len(rows) or _alike(rows, begin):
        return f"{said}, so answers may not end; train the output embedding too (train_also)"
    tokenizer.eos_token = tokenizer.bos_token
    return f"{said}; texts end with {tokenizer.bos_token!r} instead"


def _alike(rows: Tensor, token: int) -> int:
    """How many other rows are the same as this token's."""
    own = rows[token]
    bound = _SAME * float(own.norm())
    near = sum(int(((some.float() - own).norm(dim=-1) <= bound).sum()) for some in rows.split(4096))
    return near - 1


@torch.no_grad()
def _output_rows(model: Any, where: Path | None) -> Tensor | None:
    """The output embedding (vocabulary, width); None if it is quantized, is no matrix, or is not to be had."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        return None
    if not weight.is_meta:
        return weight.detach()
    return None if where is None else _stored(model, head, where)


def _stored(model: Any, head: Any, where: Path) -> Tensor | None:
    """The same, read from its file; tied to the input embedding it is stored under that one's name."""
    from lorakit.checkpoints.opening import open_checkpoint

    try:
        checkpoint = open_checkpoint(where, "the base")
        for name, module in model.named_modules():
            tied = module is model.get_input_embeddings() and model.config.get_text_config().tie_word_embeddings
            if (module is head or tied) and f"{name}.weight" in checkpoint.tensors:
                return checkpoint.read(f"{name}.weight")
    except (LorakitError, AttributeError):
        return None  # opening the base itself says what is wrong
    return None
