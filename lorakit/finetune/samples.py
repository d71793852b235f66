"""What the model writes at an evaluation: a few prompts, continued as it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.finetune.trainer import kept_rng

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


def prompts_of(wanted: int | Sequence[str], rows: Any, tokenizer: Any, template: str | None, room: int) -> list[Prompt]:
    """The prompts: the first few of the validation rows, or texts that were given; the last `room` tokens of each."""
    from lorakit.finetune.data import prompt_of

    found = []
    if isinstance(wanted, int):
        for row in list(rows[:wanted]) if wanted else []:
            tokens, expected = prompt_of(row, tokenizer, template)
            if expected is None:
                tokens, expected = tokens[:_OPENING], tokenizer.decode(tokens[_OPENING:], skip_special_tokens=True)
            found.append((tokens, expected))
    else:
        found = [(list(tokenizer(text)["input_ids"]), None) for text in wanted]
        end = tokenizer.eos_token_id
        found = [(tokens[:-1] if len(tokens) > 1 and tokens[-1] == end else tokens, None) for tokens, _ in found]
    return [
        Prompt(tokenizer.decode(tokens[-room:], skip_special_tokens=True), tuple(tokens[-room:]), expected)
        for tokens, expected in found
        if tokens
    ]


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompts: Sequence[Prompt], length: int) -> list[Sample]:
    """Each prompt continued greedily, all in one batch. The model's mode and the random state stay as they are."""
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
                eos_token_id=tokenizer.eos_token_id,
            )
    finally:
        model.train(training)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [Sample(prompt.text, text, prompt.expected) for prompt, text in zip(prompts, texts, strict=True)]
