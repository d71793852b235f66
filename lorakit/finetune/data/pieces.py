"""Pieces of text as tokens: each alone, so that no token reaches over an edge, and together what the whole text is."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.finetune.data.drafts import Draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", ".", "|", "0", "a")
_SAMPLES = ("x", "the", "Hello there", "7", " y")
_BATCH = 10_000
Ids = list[int]


class Encoder:
    """A tokenizer for pieces of texts.

    Some tokenizers (those after SentencePiece) put a space before every text that they are given, so also before a
    piece from the middle of one. Such a piece is encoded behind an anchor, a short text whose tokens stay the same
    whatever follows, and these are taken off again.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        # Set by nobody, it makes a later fork (a data loader's workers) print a warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._tokenizer = tokenizer
        self.start: Ids = self._start()
        self.begin: Ids = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        """What a text may begin with by itself: a chat template puts it there."""
        self.end: Ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        added = tokenizer.added_tokens_decoder.values()
        # Those after which a tokenizer sees a new text, or drops white space.
        self._added = tuple(sorted((token.content for token in added if token.content.strip()), key=len, reverse=True))
        self._stripping = {token.content for token in added if token.rstrip}
        self._glued = self._is_glued()

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of whole texts, without any that the tokenizer adds."""
        unique = list(dict.fromkeys(texts))
        found: dict[str, Ids] = {}
        for at in range(0, len(unique), _BATCH):
            batch = unique[at : at + _BATCH]
            encoded = self._tokenizer(
                batch,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                padding=False,
                truncation=False,
                verbose=False,
            )
            found.update(zip(batch, encoded["input_ids"], strict=True))
        return [found[text] for text in texts]

    def pieces(self, drafts: Sequence[Draft]) -> list[list[Ids]]:
        """The tokens of each piece of each draft."""
        found: list[list[Ids]] = [[[] for _ in draft.pieces] for draft in drafts]
        firsts: list[tuple[int, int, str]] = []
        after: dict[str, list[tuple[int, int, str]]] = {}
        for i, draft in enumerate(drafts):
            before = ""
            for j, (text, _) in enumerate(draft.pieces):
                if not text:
                    continue
                anchor = self._anchor(before) if before else None
                (firsts if anchor is None else after.setdefault(anchor, [])).append((i, j, text))
                before = text
        for (i, j, _), ids in zip(firsts, self.ids([text for _, _, text in firsts]), strict=True):
            found[i][j] = ids
        for anchor, places in after.items():
            for (i, j, _), ids in zip(places, self._behind(anchor, [text for _, _, text in places]), strict=True):
                found[i][j] = ids
        return found

    def _start(self) -> Ids:
        """What the tokenizer begins a text with."""
        bare = self.ids(["a"])[0]
        full = list(self._tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at]

    def _anchor(self, before: str) -> str | None:
        """What a piece is encoded behind, by the text before it; None if it may stand alone."""
        if before.endswith(self._added):
            token = next(token for token in self._added if before.endswith(token))
            return token if self._glued or token in self._stripping else None
        return _ANCHORS[0] if self._glued else None

    def _is_glued(self) -> bool:
        """Whether a text from the middle of another has other tokens when it is encoded alone."""
        for anchor in _ANCHORS:
            behind = self._cut(anchor, _SAMPLES)
            if all(ids is not None for ids in behind):
                return behind != self.ids(_SAMPLES)
        return False

    def _cut(self, anchor: str, texts: Sequence[str]) -> list[Ids | None]:
        """The tokens of texts behind an anchor; None where the anchor's own change."""
        own = self.ids([anchor])[0]
        return [ids[len(own) :] if ids[: len(own)] == own else None for ids in self.ids([anchor + t for t in texts])]

    def _behind(self, anchor: str, texts: list[str]) -> list[Ids]:
        """The tokens of texts behind an anchor, or another where that one changes; else alone."""
        found: dict[str, Ids] = {}
        for each in (anchor, *_ANCHORS):
            left = [text for text in dict.fromkeys(texts) if text not in found]
            if not left:
                break
            found.update((text, ids) for text, ids in zip(left, self._cut(each, left), strict=True) if ids is not None)
        left = [text for text in dict.fromkeys(texts) if text not in found]
        found.update(zip(left, self.ids(left), strict=True))
        return [found[text] for text in texts]
