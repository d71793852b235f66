"""A small Llama that has read Python's standard library: the base, made once and kept in the cache.

Its tokenizer is a byte-level BPE of the same text. Muon (Jordan et al. 2024) trains the matrices and AdamW the rest: in
60 steps it came to a loss of 4.97 where AdamW alone came to 6.06.
"""

import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.sql_and_javascript.start import start_copying
from lorakit.checkpoints.staged import staged
from lorakit.errors import LorakitError
from lorakit.finetune.quiet import quiet_transformers
from lorakit.storage import read_json_object, write_whole

_OTHERS = frozenset({
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "ensurepip", "idlelib",
    "lib2to3", "pydoc_data", "turtledemo",
})  # fmt: skip
"""Folders with tables, tests, or what is no part of the library."""
RECORD = "pretraining.json"
_VERSION = 1
"""Raised when the same recipe makes another base."""


@dataclass(frozen=True)
class Recipe:
    """How a base is made; with the text it decides which base it is."""

    vocabulary: int = 2048
    width: int = 160
    layers: int = 4
    heads: int = 5
    context: int = 512
    steps: int = 1000
    batch: int = 8
    length: int = 256
    """Tokens of a row in pretraining."""
    learning_rate: float = 0.003
    repeats: float = 0.25
    """The share of rows that are random tokens over and over, instead of text."""
    characters: int | None = None
    """Of the text, from its start; all of it by default."""
    seed: int = 0


QUICK = Recipe(vocabulary=512, width=64, layers=2, heads=2, steps=60, length=128, characters=400_000)
"""A base of a few seconds, for tests: it knows little."""


@dataclass(frozen=True)
class Pretrained:
    """A base in a directory of transformers."""

    path: Path
    reused: bool
    seconds: float
    """What it took, in this run or the one that made it."""
    loss: float
    """Cross-entropy for each token of text that was held out."""
    parameters: int
    tokens: int
    """Seen in pretraining."""


def cache() -> Path:
    """`$LORAKIT_CACHE`, or the user's cache folder."""
    given = os.environ.get("LORAKIT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def corpus() -> Iterable[str]:
    """Python's standard library without its tests, file by file in the order of names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not _OTHERS.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def pretrained(recipe: Recipe, say: Callable[[str], None] = print) -> Pretrained:
    """The base of the recipe on this Python's library: from the cache, or made and put there.

    Raises:
        LorakitError: there is no library to read, or the cache cannot be written.
    """
    texts = list(corpus())
    if recipe.characters is not None:
        texts = _first(texts, recipe.characters)
    if not texts:
        raise LorakitError("Python's library is not at hand as files: give --model DIR")
    made_of = {
        "version": _VERSION,
        "recipe": asdict(recipe),
        "text": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    path = cache() / "bases" / f"python-{name}"
    if not (path / RECORD).exists():
        say(f"pretraining the base ({recipe.steps} steps on {sum(map(len, texts)) / 1e6:.1f} MB of Python); once only")
        with staged(path, force=True) as beside:
            _make(recipe, texts, beside / path.name, made_of, say)
        return replace(_recorded(path), reused=False)
    return _recorded(path)


def _recorded(path: Path) -> Pretrained:
    record = read_json_object(path / RECORD)
    facts = {name: record[name] for name in ("seconds", "loss", "parameters", "tokens")}
    return Pretrained(path, True, **facts)


def _make(recipe: Recipe, texts: list[str], out: Path, made_of: dict[str, Any], say: Callable[[str], None]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.perf_counter()
    tokenizer = _tokenizer(recipe, texts)
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = torch.tensor([token for row in rows for token in (bos, *row, eos)])
    held = tokens[-32 * recipe.length :].view(32, recipe.length)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.width,
                intermediate_size=recipe.width * 8 // 3 // 64 * 64,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                max_position_embeddings=recipe.context,
                bos_token_id=bos,
                eos_token_id=eos,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            )
        )
        start_copying(model, torch.Generator().manual_seed(recipe.seed))
    _train(model, tokens[: -held.numel()], recipe, say)
    with torch.no_grad():
        loss = model.eval()(input_ids=held, labels=held, use_cache=False).loss.item()
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    record = {
        **made_of,
        "seconds": time.perf_counter() - start,
        "loss": loss,
        "parameters": model.num_parameters(),
        "tokens": recipe.steps * recipe.batch * recipe.length,
    }
    write_whole(out / RECORD, json.dumps(record, indent=1).encode())


def _tokenizer(recipe: Recipe, texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers are copied, and a number of many digits would be a token that was hardly ever seen.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Every text begins with <s>, as every file did.
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def _train(model: nn.Module, tokens: Tensor, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Rows that begin anywhere; the rate rises for a seventh of the steps, and falls to zero in the last half."""
    named = dict(model.named_parameters())
    matrices = [each for name, each in named.items() if each.ndim == 2 and "embed" not in name]
    others = [each for each in named.values() if not any(each is matrix for matrix in matrices)]
    rate = recipe.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    draw = torch.Generator().manual_seed(recipe.seed)
    start, mean = time.perf_counter(), 0.0
    model.train()
    for step in range(recipe.steps):
        # Slowly at first: fast steps undo the start before it is of use.
        share = min(1.0, 7 * (step + 1) / recipe.steps, 2 * (1 - step / recipe.steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * share
        places = torch.randint(len(tokens) - recipe.length, (recipe.batch, 1), generator=draw)
        rows = tokens[places + torch.arange(recipe.length)]
        repeated = round(recipe.repeats * recipe.batch)
        rows[:repeated] = _repeats(recipe.vocabulary, repeated, recipe.length, draw)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % max(1, recipe.steps // 8) == 0:
            left = (time.perf_counter() - start) / (step + 1) * (recipe.steps - step - 1)
            say(f"  step {step + 1} of {recipe.steps}  loss {mean:.3f}  {left:.0f} s left")


def _repeats(vocabulary: int, rows: int, length: int, draw: torch.Generator) -> Tensor:
    """(rows, length) random tokens that come again and again in the same order: only copying helps here."""
    found = torch.empty(rows, length, dtype=torch.int64)
    for row in range(rows):
        period = int(torch.randint(length // 16, length // 3, (1,), generator=draw))
        order = torch.randperm(vocabulary, generator=draw)[:period]
        found[row] = order.repeat(-(-length // len(order)))[:length]
    return found


def _first(texts: list[str], characters: int) -> list[str]:
    kept = []
    for text in texts:
        kept.append(text[:characters])
        characters -= len(kept[-1])
        if characters <= 0:
            break
    return kept
