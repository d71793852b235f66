"""Encoding: rows as examples, prompts as the tokens to generate from, both the same way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.finetune.data.contents import BadRowError
from lorakit.finetune.data.drafts import Draft, Recipe, recipe_of
from lorakit.finetune.data.examples import Encoded, Example
from lorakit.finetune.data.pieces import Encoder, Ids
from lorakit.finetune.data.reading import refusal
from lorakit.finetune.data.report import Report
from lorakit.finetune.data.rows import Row, Rows
from lorakit.finetune.pause import uncollected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["cut", "drop", "error"]
TrainOn = Literal["completion", "all"]


def encode(
    rows: Rows | Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    truncation: Truncation = "cut",
    train_on: TrainOn = "completion",
    template: str | None = None,
) -> Encoded:
    r"""Rows as examples of at most `max_length` tokens.

    Each begins with what the tokenizer begins a text with (no second one where the text has it) and ends with its
    token for the end of a text, which is trained on too. Prompt and completion are encoded apart: the prompt's
    tokens are those that `prompt_of` gives to generate from.

    - messages go through the chat template, or `template`; trained on are the assistant's turns, each with the token
      that ends it.
    - prompt and completion are put together as they are, for a tokenizer with a chat template too; `template` may
      be plain ("Question: {prompt}\nAnswer: ") or a chat template, which makes them a user's and an assistant's turn.
    - instruction, input and output are such turns where the tokenizer has a chat template (the input after the
      instruction and an empty line), and else put under the headings of the template "instruction".
    - text is trained on as a whole.

    Names of special tokens in a text are these tokens, as they are for the tokenizer itself.

    What is too long is cut so that the answer is kept: first the beginning of the prompt (but not of the text: what
    the tokenizer puts first stays), until half of `max_length` is left of it, then the end of what follows. Of text
    and of a chat's later turns the end is cut.

    Args:
        rows: from `read_rows`, or rows of any kinds.
        tokenizer: the base's.
        max_length: tokens of an example at most.
        truncation: "cut", "drop", or "error", which names all that are too long.
        train_on: "all" trains on prompts too.
        template: a name ("chatml", "simple", "instruction", "alpaca"), a file, or the template itself.

    Raises:
        LorakitError: there is no template for messages, it refuses rows, an example is too long (with "error"), or no
            example is left.
    """
    _check(max_length, truncation, train_on)
    with uncollected():
        return _encode(rows, tokenizer, max_length, truncation, train_on, template)


def _check(max_length: int, truncation: str, train_on: str) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise LorakitError(f"max_length is {max_length!r}: an example has at least 2 tokens, as one predicts the next")
    for name, value, known in (
        ("truncation", truncation, ("cut", "drop", "error")),
        ("train_on", train_on, ("completion", "all")),
    ):
        if value not in known:
            raise LorakitError(f"{name} {value!r} is none of {', '.join(known)}")


def _encode(
    rows: Rows | Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    truncation: Truncation,
    train_on: TrainOn,
    template: str | None,
) -> Encoded:
    source = rows.source if isinstance(rows, Rows) else "the rows"
    places, drafts, parted = _drafts(rows, source, tokenizer, template)
    touching = 0 if template is not None else sum(_touches(row) for row in rows)
    encoder = Encoder(tokenizer)
    examples, longest, cut, lost = [], 0, 0, 0
    dropped: dict[str, list[str]] = {}
    too_long = []
    for where, draft, pieces in zip(places, drafts, encoder.pieces(drafts), strict=True):
        ids, mask, lead, fixed = _joined(draft, pieces, encoder, train_on == "all")
        longest = max(longest, len(ids))
        if not mask.any():
            dropped.setdefault("no token to train on", []).append(where)
        elif len(ids) <= max_length:
            examples.append(Example(ids, mask, where))
        elif truncation == "drop":
            dropped.setdefault(f"longer than {max_length:,} tokens", []).append(where)
        elif truncation == "error":
            too_long.append(f"{where}: has {len(ids):,} tokens; max_length is {max_length:,}")
        else:
            keep = _kept(len(ids), lead, fixed, max_length)
            cut, lost = cut + 1, lost + len(ids) - max_length
            example = _trimmed(Example(ids[keep], mask[keep], where), train_on == "all")
            if example.mask.any():
                examples.append(example)
            else:
                dropped.setdefault("no token to train on after the cut", []).append(where)
    if too_long:
        raise LorakitError(refusal(source, too_long))
    unknown = tokenizer.unk_token_id
    report = Report(
        rows=len(rows),
        examples=len(examples),
        tokens=sum(map(len, examples)),
        trained_tokens=sum(int(example.mask.sum()) for example in examples),
        longest=longest,
        max_length=max_length,
        truncated=cut,
        lost_tokens=lost,
        dropped={reason: tuple(found) for reason, found in dropped.items()},
        parted=parted,
        touching=touching,
        unknown=0 if unknown is None else sum(int((example.ids == unknown).sum()) for example in examples),
        ended=bool(encoder.end),
    )
    if not examples:
        raise LorakitError(f"{source}: nothing is left to train on\n{report}")
    return Encoded(examples, report)


def _drafts(
    rows: Rows | Sequence[Row], source: str, tokenizer: "PreTrainedTokenizerBase", template: str | None
) -> tuple[list[str], list[Draft], int]:
    """The drafts of rows with their places, and how many rows became several.

    Raises:
        LorakitError: rows cannot become text; all are named.
    """
    recipes: dict[str, Recipe] = {}
    places: list[str] = []
    drafts: list[Draft] = []
    bad: list[str] = []
    parted = 0
    for row in rows:
        if row.kind not in recipes:
            recipes[row.kind] = recipe_of(row.kind, tokenizer, template)
        try:
            found = recipes[row.kind](row)
        except BadRowError as error:
            bad.append(f"{row.where}: {error}")
            continue
        parted += len(found) > 1
        drafts += found
        places += [row.where] * len(found)
    if bad:
        raise LorakitError(refusal(source, bad))
    return places, drafts, parted


def _touches(row: Row) -> bool:
    """Whether prompt and completion become one word, as they are put together as they are."""
    if row.kind != "prompt":
        return False
    prompt, completion = row.content["prompt"], row.content.get("completion") or ""
    return not (prompt[-1:].isspace() or completion[:1].isspace() or not prompt or not completion)


def _joined(
    draft: Draft, pieces: list[Ids], encoder: Encoder, everything: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_], int, int]:
    """Tokens, which are trained on, how many come before those, and how many a text begins with anyway."""
    start, bare = first_ids(draft, pieces, encoder)
    ids = list(start)
    spans: list[tuple[int, int]] = []
    lead = None
    for (_, trained), piece in zip(draft.pieces, pieces, strict=True):
        if trained and piece:
            lead = len(ids) if lead is None else lead
            spans.append((len(ids), len(ids) + len(piece)))
        ids += piece
    if draft.end and ids[-1:] != encoder.end:
        spans.append((len(ids), len(ids) + len(encoder.end)))
        ids += encoder.end
    array = np.array(ids, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=np.bool_)
    if everything:
        mask[len(start) :] = True
    for a, b in spans:
        mask[a:b] = True
    mask[: max(1, len(start) + bare)] = False
    example = _trimmed(Example(array, mask, ""), everything)
    return example.ids, example.mask, len(ids) if lead is None else lead, max(len(start) + bare, 0)


def first_ids(draft: Draft, pieces: list[Ids], encoder: Encoder) -> tuple[Ids, int]:
    """What is put before a draft's tokens, and how many of its own are the same already."""
    text = next((piece for piece in pieces if piece), [])
    begin = encoder.start or encoder.begin
    has = len(begin) if begin and text[: len(begin)] == begin else 0
    return (encoder.start if draft.start and not has else []), has


def _trimmed(example: Example, everything: bool) -> Example:
    """Without the tokens after the last one that is trained on: nothing depends on them."""
    trained = np.flatnonzero(example.mask)
    if everything or not len(trained) or trained[-1] == len(example) - 1:
        return example
    return Example(example.ids[: trained[-1] + 1], example.mask[: trained[-1] + 1], example.where)


def _kept(length: int, lead: int, fixed: int, max_length: int) -> NDArray[np.int64]:
    """Positions of what is kept of an example that is too long.

    Args:
        length: its tokens.
        lead: those before the first piece that is trained on.
        fixed: those that a text begins with.
        max_length: how many are kept.
    """
    rest = min(length - lead, max(max_length - lead, max_length - max_length // 2))
    head = max_length - rest
    fixed = min(fixed, head)
    return np.concatenate([np.arange(fixed), np.arange(lead - (head - fixed), lead + rest)])


def prompt_of(
    row: Row, tokenizer: "PreTrainedTokenizerBase", template: str | None = None
) -> tuple[list[int], str | None]:
    """The tokens to generate from, the same that training has before the answer, and the answer that is expected.

    A row may lack its completion, output, or last answer: what is asked is enough.

    Args:
        row: of any kind; of messages, the last answer is what is asked for.
        tokenizer: as for `encode`; and so
        template: as there.

    Returns:
        Tokens, and the answer without what ends it: None if the row has none, as text never has.

    Raises:
        LorakitError: there is no template for messages, or it refuses them.
    """
    try:
        draft = recipe_of(row.kind, tokenizer, template)(row)[-1]
    except BadRowError as error:
        raise LorakitError(f"{row.where}: {error}") from None
    encoder = Encoder(tokenizer)
    pieces = encoder.pieces([draft])[0]
    ids = list(first_ids(draft, pieces, encoder)[0])
    for piece in pieces[: draft.answer]:
        ids += piece
    return ids, draft.expected
