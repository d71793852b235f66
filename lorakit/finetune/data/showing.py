"""Examples as text again, to look at, and the tokens that end an answer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from lorakit.finetune.data.drafts import recipe_of
from lorakit.finetune.data.examples import Example
from lorakit.finetune.data.packing import Packed
from lorakit.finetune.data.pieces import Encoder
from lorakit.finetune.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shown(example: Example | Packed, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """The text of an example in pieces, each with whether it is trained on; together they are the text as a whole.

    Special tokens are shown by their names. The first token of an example is never trained on.
    """
    if isinstance(example, Packed):
        return [piece for part in example.examples for piece in shown(part, tokenizer)]
    mask = example.mask
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    pieces, before = [], ""
    for start, end in pairwise(edges):
        text = _decoded(tokenizer, example.tokens[:end])
        # What a decoder makes of a whole is not that of its parts put together: a space less, a letter of two tokens.
        piece = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, example.tokens[start:end])
        pieces.append((piece, bool(mask[start])))
        before = text
    return pieces


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def stops_of(kind: str, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> tuple[int, ...]:
    """The tokens at which an answer ends, as rows of a kind are trained: the tokenizer's end of a text, and a chat's.

    Raises:
        LorakitError: there is no template for messages.
    """
    encoder = Encoder(tokenizer)
    content = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "prompt": "a",
        "completion": "b",
        "instruction": "a",
        "output": "b",
        "text": "a",
    }
    draft = recipe_of(kind, tokenizer, template)(Row("", kind, content))[-1]
    last = next((text for text, trained in reversed(draft.pieces) if trained), "")
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {i for token, i in special.items() if token and last.endswith(token)}
    return tuple(sorted(ends.union(encoder.end)))
