"""What the model writes at an evaluation: a few prompts, continued as it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.finetune.data import Row, Rows, prompt_of
from lorakit.finetune.training.trainer import kept_rng

_OPENING = 16
"""Tokens of a plain text that are given as a prompt."""


@dataclass(frozen=True)
class Prompt:
    """Something to continue, and what was expected, if that is known."""

    text: str
    tokens: tuple[int, ...]
    expected: str | None


@dataclass(frozen=True)
class Sample:
    """What came of a prompt."""

    prompt: str
    text: str
    expected: str | None


def prompts_of(
    wanted: int | Sequence[str], rows: Rows, tokenizer: Any, template: str | None, room: int
) -> list[Prompt]:
    """The prompts: the first few of the rows, or texts that were given, asked as the rows ask.

    Args:
        wanted: how many, or which.
        rows: of the validation data.
        tokenizer: the base's.
        template: as training has it.
        room: tokens of a prompt at most; of a longer one the last.
    """
    if isinstance(wanted, int):
        asked = list(rows[:wanted])
    else:
        asked = [Row(f"sample {i}", rows.kind, _content(rows.kind, text)) for i, text in enumerate(wanted, start=1)]
    found = []
    for row in asked:
        tokens, expected = prompt_of(row, tokenizer, template)
        if row.kind == "text" and isinstance(wanted, int):
            tokens, expected = tokens[:_OPENING], tokenizer.decode(tokens[_OPENING:], skip_special_tokens=True)
        tokens = tokens[-room:]
        found.append(Prompt(tokenizer.decode(tokens, skip_special_tokens=True), tuple(tokens), expected))
    return [prompt for prompt in found if prompt.tokens]


def _content(kind: str, text: str) -> dict[str, Any]:
    """A row of this kind that asks a text."""
    if kind == "messages":
        return {"messages": [{"role": "user", "content": text}]}
    return {kind: text, "input": ""} if kind == "instruction" else {kind: text}


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompts: Sequence[Prompt], length: int, stops: Sequence[int]) -> list[Sample]:
    """Each prompt continued greedily to one of the stops, all in one batch; mode and random state stay as they are."""
    if not prompts:
        return []
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[i, longest - len(prompt.tokens) :] = 1
    training = model.training
    model.eval()
    try:
        with kept_rng():
            out: Tensor = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=length,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(stops) or None,
            )
    finally:
        model.train(training)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [Sample(prompt.text, text, prompt.expected) for prompt, text in zip(prompts, texts, strict=True)]
