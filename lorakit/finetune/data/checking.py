"""Whether a model keeps the examples of a packed row apart: proved by running it."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError

_LENGTHS = (7, 5, 6)
_SHARE = 0.25
"""How much of what another example would do to the outputs may be there after all, in half precision."""


def check_packing(model: nn.Module) -> None:
    """Prove that in a packed row no example sees another, with this model, its attention and its adapters as they are.

    Random tokens are run as a row of three examples, each example alone, and all as one text. In `eval()` the packed
    row must give what the examples give alone, to the dtype's precision; in `train()` (with the same random numbers
    for dropout) other tokens in one example must change nothing in the others. The model is left as it was: its
    mode, buffers and the states of random numbers too.

    Args:
        model: a causal language model of transformers, or one that is called alike.

    Raises:
        LorakitError: it takes no positions, or an example sees another.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise LorakitError(_refusal(name, "takes no position_ids"))
    batch = _Batch.of(model)
    with _as_it_was(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        try:
            found = _alone(model, batch)
            model.train()
            found = found or _touched(model, batch)
        except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
            line = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise LorakitError(_refusal(name, f"cannot be run on a packed row ({line[:200]})")) from error
    if found is not None:
        raise LorakitError(_refusal(name, found))


def _refusal(name: str, why: str) -> str:
    return (
        f"{name} {why}: packing would let examples leak into one another, and is refused. Train without packing "
        "(shorter rows are padded), or try another attention implementation, such as sdpa"
    )


@dataclass(frozen=True)
class _Batch:
    """Two rows of three examples, (2, n), with positions of their own; and the same row with other tokens in one."""

    ids: Tensor
    positions: Tensor
    spans: tuple[tuple[int, int], ...]
    other: Tensor
    """Tokens that differ from `ids` everywhere."""

    @staticmethod
    def of(model: nn.Module) -> "_Batch":
        """Tokens of the model's vocabulary that mean nothing special to it, as long as its context allows.

        Raises:
            LorakitError: it has no embedding of tokens.
        """
        config: Any = getattr(model, "config", None)
        try:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            weight, vocabulary = embedding.weight, int(embedding.weight.shape[0])
        except (AttributeError, NotImplementedError, TypeError):
            raise LorakitError(
                f"{type(model).__name__} has no embedding of tokens: packing cannot be checked"
            ) from None
        if config is not None and isinstance(getattr(config, "vocab_size", None), int):
            vocabulary = min(vocabulary, config.vocab_size)
        special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "unk")}
        plain = [i for i in range(min(vocabulary, 20_000)) if i not in special] or [0]
        context = getattr(config, "max_position_embeddings", None) or sum(_LENGTHS)
        lengths = [max(2, min(n, context // 3)) if isinstance(context, int) else n for n in _LENGTHS]
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(plain), (2, sum(lengths)), generator=generator)
        steps = torch.randint(1, max(2, len(plain)), picks.shape, generator=generator)
        names = torch.tensor(plain)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).contiguous()
        device = weight.device
        return _Batch(
            names[picks].to(device),
            positions.to(device),
            tuple((start, start + n) for start, n in zip(starts, lengths, strict=True)),
            names[(picks + steps) % len(plain)].to(device),
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """(rows, n, vocabulary), in float32 or better."""
    found: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return found if found.dtype == torch.float64 else found.float()


def _precision(model: nn.Module, logits: Tensor) -> float:
    """The coarsest rounding on the way: that of a float, or of a base in 8 or 4 bits."""
    dtypes = {parameter.dtype for parameter in model.parameters()} | {logits.dtype}
    rounding = [torch.finfo(t).eps if t.is_floating_point and t.itemsize > 1 else 2**-7 for t in dtypes]
    tf32 = logits.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(*rounding, 2**-10 if tf32 else 0.0)


def _is_fine(precision: float) -> bool:
    """Whether rounding is far below whatever one example does to another."""
    return precision < 1e-6


def _alone(model: nn.Module, batch: _Batch) -> str | None:
    """What is wrong with the packed row against each example alone."""
    packed = _logits(model, batch.ids, batch.positions)
    joined = _logits(model, batch.ids, torch.arange(batch.ids.shape[1], device=batch.ids.device).expand(2, -1))
    precision, scale = _precision(model, packed), float(packed.abs().mean())
    if not packed.isfinite().all():
        return "gives outputs that are not finite"
    apart = seen = 0.0
    for start, end in batch.spans:
        own = _logits(model, batch.ids[:, start:end], batch.positions[:, start:end])
        apart = max(apart, float((packed[:, start:end] - own).abs().mean()))
        seen = max(seen, float((joined[:, start:end] - own).abs().mean()))
    # A leak is told from rounding by what a real one would do: the examples run as one text.
    if apart <= (1000 if _is_fine(precision) else 64) * precision * scale and (
        apart <= _SHARE * seen or apart <= 2 * precision * scale
    ):
        return None
    return f"gives other outputs for examples in a packed row than for each alone (by {apart / max(scale, 1e-30):.1e})"


def _touched(model: nn.Module, batch: _Batch) -> str | None:
    """Whether tokens of one example change the outputs of another, in training."""
    state = torch.get_rng_state()

    def run(ids: Tensor) -> Tensor:
        torch.set_rng_state(state)
        if ids.device.type == "cuda":
            torch.cuda.manual_seed_all(0)
        return _logits(model, ids, batch.positions)

    before = run(batch.ids)
    scale, precision = float(before.abs().mean()), _precision(model, before)
    limit = scale * precision * (64 if _is_fine(precision) else 0.5)
    for i, (start, end) in enumerate(batch.spans):
        ids = batch.ids.clone()
        ids[:, start:end] = batch.other[:, start:end]
        after = run(ids)
        for j, (a, b) in enumerate(batch.spans):
            if i != j and not float((after[:, a:b] - before[:, a:b]).abs().mean()) <= limit:
                return "lets an example in a packed row see another, in training"
    return None


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Each module's mode, the buffers and the states of random numbers, as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    on_cuda = any(parameter.device.type == "cuda" for parameter in model.parameters())
    devices = range(torch.cuda.device_count()) if on_cuda else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers and not torch.equal(buffer, buffers[name]):
                        buffer.copy_(buffers[name])
