"""Generation: several prompts and several adapters in one batch, by transformers' `generate`."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.finetune.base import Base
from lorakit.finetune.generation.steps import Choose, Ended, Row, Sampling, Watch, seed_of
from lorakit.finetune.generation.text import TextStream
from lorakit.finetune.quiet import quiet_transformers
from lorakit.resident import adapters
from lorakit.switch import active, disabled, per_row

Chosen = str | Mapping[str, float] | None
"""Which adapter writes: a name, names with strengths, or None for the base alone."""


@dataclass(frozen=True)
class Request:
    """A prompt, and who continues it.

    Attributes:
        tokens: the prompt.
        adapter: who continues it.
        ends: tokens that end this one, beside those that end any.
        repeat: which of several draws of one prompt it is, where they are not all in one call.
    """

    tokens: tuple[int, ...]
    adapter: Chosen = None
    ends: frozenset[int] = frozenset()
    repeat: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        text: the continuation, without the prompt, the end and the stop string.
        tokens: its tokens, without the end of text; with those of a stop string.
        ended: "end" of the text, a "stop" string, or "length".
        seconds: from the start of its batch.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ended
    seconds: float


def generate(
    base: Base,
    requests: Sequence[Request],
    sampling: Sampling | None = None,
    *,
    ends: Iterable[int] = (),
    batch_size: int = 16,
    heard: Callable[[int, str], None] | None = None,
    finished: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Continue prompts, each with its own adapter, in batches of any mixture.

    What a request becomes does not depend on the others in its batch, but for rounding: rows are padded on the left
    and masked, and noise is drawn for each by itself. Where a batch cannot mix adapters (one acts in a weight, which
    all rows share; strengths are given; a layer sees the batch in another way), one adapter comes after the other.

    Args:
        base: what `open_base` gave, with its adapters loaded.
        requests: prompts as tokens, and who continues them.
        sampling: how tokens are chosen; by default the most probable, 256 at most.
        ends: tokens that end a text, beside those of `ends_of`.
        batch_size: requests at once.
        heard: called with a request's number and each new piece of its text, as it comes.
        finished: called with a request's number and its answer, batch by batch.

    Returns:
        The answers, in the order of the requests.

    Raises:
        LorakitError: an unknown adapter, a prompt that is empty, fills the context or has tokens that the model does
            not know, or the model computes NaN.
    """
    sampling = Sampling() if sampling is None else sampling
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise LorakitError(f"batch_size={batch_size!r} must be 1 or more")
    _check(base, requests)
    seeds, last = _seeds(requests, sampling), ends_of(base).union(ends)
    answers: dict[int, Answer] = {}

    def run(indices: Sequence[int], choose: Callable[[list[Chosen]], AbstractContextManager[None]]) -> None:
        for batch in _batches(base.model, [i for i in indices if i not in answers], requests, batch_size):
            listen = None if heard is None else lambda row, piece, batch=batch: heard(batch[row], piece)
            mine = [requests[i] for i in batch]
            with choose([request.adapter for request in mine]):
                found = _batch(base, mine, sampling, [seeds[i] for i in batch], last, listen)
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
                if finished is not None:
                    finished(i, answer)

    model = base.model
    with _ready(model):
        groups = _groups(requests)
        if len(groups) > 1 and unmixable(model, [request.adapter for request in requests]) is None:
            # If some layer does not see the rows, what is missing comes below.
            with suppress(LorakitError):
                run(range(len(requests)), lambda chosen: per_row(model, chosen))  # type: ignore[arg-type]
        for indices in groups:
            run(indices, lambda chosen: acting(model, chosen[0]))
    return [answers[i] for i in range(len(requests))]


def unmixable(model: nn.Module, chosen: Sequence[Chosen]) -> str | None:
    """Why these adapters cannot act in one batch, each on its rows; None if they can, as far as can be told."""
    if any(isinstance(each, Mapping) for each in chosen):
        return "several adapters with strengths act on all rows"
    try:
        with per_row(model, list(chosen)):  # type: ignore[arg-type]
            return None
    except LorakitError as error:
        return str(error)


def acting(model: nn.Module, chosen: Chosen) -> AbstractContextManager[None]:
    """Inside, this adapter acts, or the base alone."""
    if chosen is None:
        return disabled(model) if adapters(model) else nullcontext()
    return active(model, chosen)


def context_of(model: Any) -> int | None:
    """How many tokens the model sees at most; None if its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


def ends_of(base: Base) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer and the model's configs."""
    found: set[int] = set()
    configs = (base.model.generation_config, base.model.config)
    for stated in (base.tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        found.update(stated if isinstance(stated, list | tuple) else [stated] if isinstance(stated, int) else [])
    return frozenset(found)


def _check(base: Base, requests: Sequence[Request]) -> None:
    known = adapters(base.model)
    model: Any = base.model
    rows, context = model.get_input_embeddings().weight.shape[0], context_of(model)
    for i, request in enumerate(requests):
        names = [request.adapter] if isinstance(request.adapter, str) else list(request.adapter or ())
        for name in names:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "none is loaded"
                raise LorakitError(f"there is no adapter {name!r}: {there}")
        if not request.tokens:
            raise LorakitError(f"prompt {i + 1} is empty, and the tokenizer has no token to begin a text with")
        if max(request.tokens) >= rows:
            most = max(request.tokens)
            raise LorakitError(
                f"the tokenizer gives token {most}, and the model has {rows}: they do not belong together"
            )
        if context is not None and len(request.tokens) >= context:
            size = len(request.tokens)
            raise LorakitError(f"prompt {i + 1} has {size} tokens, which leaves no room in the context of {context}")


def _seeds(requests: Sequence[Request], sampling: Sampling) -> list[int]:
    seed = torch.seed() if sampling.seed is None and sampling.temperature > 0 else sampling.seed or 0
    repeats: Counter[tuple[Any, ...]] = Counter()
    seeds = []
    for request in requests:
        key = request.tokens, _key(request.adapter), request.repeat
        seeds.append(seed_of(seed, request.tokens, request.repeat + repeats[key]))
        repeats[key] += 1
    return seeds


def numbered(requests: Iterable[Request]) -> list[Request]:
    """The same requests, each told which draw of its prompt it is: then they may be given in any parts."""
    repeats: Counter[tuple[Any, ...]] = Counter()
    found = []
    for request in requests:
        key = request.tokens, _key(request.adapter)
        found.append(replace(request, repeat=repeats[key]))
        repeats[key] += 1
    return found


def _key(chosen: Chosen) -> Any:
    return tuple(chosen.items()) if isinstance(chosen, Mapping) else chosen


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """The requests of each choice."""
    groups: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(_key(request.adapter), []).append(i)
    return list(groups.values())


def _batches(model: Any, indices: Sequence[int], requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """The longest prompts first: what does not fit in memory fails at once, and little is padding."""
    ordered = sorted(indices, key=lambda i: -len(requests[i].tokens))
    while ordered:
        batch = ordered[:size]
        length = len(requests[batch[0]].tokens)
        if length != len(requests[batch[-1]].tokens) and not _pads(model):
            batch = [i for i in batch if len(requests[i].tokens) == length]
        yield batch
        ordered = ordered[len(batch) :]


_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _pads(model: Any) -> bool:
    """Whether padding on the left changes nothing for this model, found by trying: for a recurrent one it may."""
    if model not in _padding:
        tokens = [i % model.get_input_embeddings().weight.shape[0] for i in (5, 7, 11)]
        with disabled(model) if adapters(model) else nullcontext():
            alone, padded = (_next_logits(model, tokens, more) for more in (0, 3))
        _padding[model] = bool((alone - padded).abs().max() <= 0.02 * alone.std() + 1e-4)
    return _padding[model]


def _next_logits(model: Any, tokens: list[int], padding: int) -> Tensor:
    ids = torch.tensor([[0] * padding + tokens], device=model.device)
    mask = torch.tensor([[0] * padding + [1] * len(tokens)], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    logits: Tensor = out.logits[0][0]
    return logits.float()


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """In `eval()` and without the model's own settings of generation, which would act beside those given here."""
    from transformers import GenerationConfig

    mode, own = model.training, model.generation_config
    make: Any = GenerationConfig
    plain = make(do_sample=False, num_beams=1, use_cache=True, pad_token_id=0)
    plain.bos_token_id = getattr(own, "bos_token_id", None)
    model.generation_config = plain
    model.eval()
    try:
        with quiet_transformers():
            yield
    finally:
        model.generation_config = own
        model.train(mode)


def _batch(
    base: Base,
    requests: Sequence[Request],
    sampling: Sampling,
    seeds: Sequence[int],
    ends: frozenset[int],
    heard: Callable[[int, str], None] | None,
) -> list[Answer]:
    context = context_of(base.model)
    rows = []
    for i, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
        room = sampling.max_new_tokens if context is None else context - len(request.tokens)
        stream = TextStream(base.tokenizer, request.tokens, sampling.stop)
        limit = min(sampling.max_new_tokens, room)
        rows.append(Row(i, request.tokens, stream, limit, seed, ends | request.ends))
    begun = time.perf_counter()
    while going := [row for row in rows if row.ended is None]:
        # Until the first has no room left: then its positions would be beyond the context, and the others go on alone.
        _steps(base, going, sampling, Watch(going, heard, begun, eager=bool(sampling.stop)))
    return [Answer(row.stream.text, tuple(row.tokens), row.ended or "length", row.seconds) for row in rows]


def _steps(base: Base, rows: Sequence[Row], sampling: Sampling, watch: Watch) -> None:
    given = [[*row.prompt, *row.tokens] for row in rows]
    longest = max(map(len, given))
    ids = torch.full((len(rows), longest), base.tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(given):
        ids[i, longest - len(tokens) :] = torch.tensor(tokens)
        mask[i, longest - len(tokens) :] = 1
    config = copy.deepcopy(base.model.generation_config)
    config.max_new_tokens = min(row.limit - len(row.tokens) for row in rows)
    generate: Any = base.model.generate
    generate(
        input_ids=ids.to(base.model.device),
        attention_mask=mask.to(base.model.device),
        generation_config=config,
        logits_processor=[Choose(sampling, rows, longest)],
        stopping_criteria=[watch],
    )
