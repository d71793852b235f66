"""Both adapters on one base: switched, mixed in one batch, switched off, and what must hold of each."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from examples.sql_and_javascript.measures import written
from lorakit.finetune.base import Base, open_base
from lorakit.finetune.generation.generate import Request

_TIMES = 200


@dataclass(frozen=True)
class Laws:
    """What was found, each of it on the prompts to test."""

    base_untouched: bool
    """Every tensor of the base in memory and the file on disk have the bits they had before anything was trained."""
    disabled_is_base: bool
    """With both adapters loaded and none acting, the logits are the bits of the base's that never had one."""
    switched_is_alone: bool
    """Switched to, each adapter gives the bits that it gives as the only one on a base of its own."""
    mixed_is_alone: bool
    """In a batch of rows for the base and for each adapter, every row's logits are those of its adapter alone, but for
    rounding, and greedy text is the same."""
    largest_difference: float
    """Of the logits in that batch from those of one at a time."""
    texts: int
    texts_equal: int
    switch_seconds: float
    """What `activate` takes."""

    def hold(self) -> bool:
        """Whether all of them do."""
        return self.base_untouched and self.disabled_is_base and self.switched_is_alone and self.mixed_is_alone


def load_adapters(base: Base, adapters: dict[str, Path]) -> None:
    """Each adapter on the base, under its name."""
    for name, path in adapters.items():
        lk.load(base.model, path, name)


def checksum(model: nn.Module) -> str:
    """Of all tensors that are the base's own, by name and bit."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora." not in name:
            found.update(name.encode())
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def file_checksum(where: Path | str) -> str:
    """Of the weights' files in a directory; of a hub id, nothing."""
    found = hashlib.sha256()
    for path in sorted(Path(where).glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def laws_of(
    base: Base, adapters: dict[str, Path], requests: Sequence[Request], before: tuple[str, str], longest: int
) -> Laws:
    """Try them.

    Args:
        base: with the adapters loaded.
        adapters: where they lie.
        requests: prompts of both tasks; whose adapters they name does not matter here.
        before: checksums of the base in memory and on disk, from before the training.
        longest: tokens to write.
    """
    batch = _padded(requests, base)
    chosen = [(None, *adapters)[i % (1 + len(adapters))] for i in range(len(requests))]
    alone: dict[str | None, Tensor] = {None: _logits(open_base(base.where, device="cpu", dtype="float32").model, batch)}
    for name, path in adapters.items():
        own = open_base(base.where, device="cpu", dtype="float32").model
        lk.load(own, path, name)
        alone[name] = _logits(own, batch)
    with lk.disabled(base.model):
        disabled = torch.equal(_logits(base.model, batch), alone[None])
    switched = True
    for name in (*adapters, *reversed(adapters)):
        lk.activate(base.model, name)
        switched = switched and torch.equal(_logits(base.model, batch), alone[name])
    with lk.per_row(base.model, chosen):
        mixed = _logits(base.model, batch)
    expected = torch.stack([alone[name][row] for row, name in enumerate(chosen)])
    seen = batch["attention_mask"].bool()
    difference = (mixed - expected)[seen].abs().max().item()
    together = written(base, [Request(r.tokens, name) for r, name in zip(requests, chosen, strict=True)], longest)
    singly = [
        written(base, [Request(request.tokens, name)], longest)[0]
        for request, name in zip(requests, chosen, strict=True)
    ]
    equal = sum(a == b for a, b in zip(together, singly, strict=True))
    return Laws(
        base_untouched=(checksum(base.model), file_checksum(base.where)) == before,
        disabled_is_base=disabled,
        switched_is_alone=switched,
        mixed_is_alone=difference <= 1e-4 * expected[seen].abs().max().item() and equal == len(singly),
        largest_difference=difference,
        texts=len(singly),
        texts_equal=equal,
        switch_seconds=_switching(base.model, list(adapters)),
    )


def _switching(model: nn.Module, names: list[str]) -> float:
    start = time.perf_counter()
    for i in range(_TIMES):
        lk.activate(model, names[i % len(names)])
    return (time.perf_counter() - start) / _TIMES


def _padded(requests: Sequence[Request], base: Base) -> dict[str, Tensor]:
    """Prompts side by side, padded on the right."""
    length = max(len(request.tokens) for request in requests)
    ids = torch.full((len(requests), length), base.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, : len(request.tokens)] = torch.tensor(request.tokens)
        mask[row, : len(request.tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits
