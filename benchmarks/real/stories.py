"""A Llama of 260 thousand parameters that tells children's stories learns Shakespeare, and SQL.

    python -m benchmarks.real.stories            # the tables: 15 s of CPU time for each training, three seeds
    python -m benchmarks.real.stories --tune     # the hyper-parameters' perplexities on the validation text

Perplexity is for each token, in rows of 256 tokens. Shakespeare: the first 80% of the characters are to train on, the
next 10% for validation, the last 10% to test. SQL: questions on four databases with their queries, split as the
collection has it, so that no query to test was trained on. The stories that the network was trained on are not at
hand; in their place stand 48 stories that the base itself told (sampled at temperature 1 with a fixed seed), whose
perplexity shows how much of the old language is forgotten.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from benchmarks.real import data, models
from benchmarks.real.compare import Arm, Experiment, command_line, everything, judged_by, low_rank
from benchmarks.real.training import Recipe

BUDGET = 15.0
BATCH = 8
LENGTH = 256
TOLD = 48
DATABASES = ("atis", "geography", "scholar", "advising")

Split = tuple[str, str, str]
"""Text to train on, for validation, to test."""


def shakespeare() -> Split:
    """By position in the file."""
    text = data.text()
    first, second = round(0.8 * len(text)), round(0.9 * len(text))
    return text[:first], text[first:second], text[second:]


def sql() -> Split:
    """Each query once, after the first of its questions."""
    parts: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for name in DATABASES:
        path = data.SHARED / "data" / "text2sql" / f"{name}.json"
        for entry in json.loads(path.read_text(encoding="utf-8")):
            parts[entry["query-split"]].append(f"{entry['sentences'][0]['text']}\n{entry['sql'][0]}\n\n")
    return "".join(parts["train"]), "".join(parts["dev"]), "".join(parts["test"])


@cache
def base() -> tuple[nn.Module, Callable[..., object]]:
    """The pretrained network and its tokenizer."""
    return models.stories()


def make() -> nn.Module:
    """The pretrained network."""
    return models.stories()[0]


def rows(text: str) -> Tensor:
    """(rows, LENGTH) tokens; what is left at the end is dropped."""
    tokens = torch.tensor(base()[1](text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[index]
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


@cache
def told() -> Tensor:
    """(TOLD, LENGTH) tokens that the base writes by itself."""
    torch.manual_seed(0)
    start = torch.full((TOLD, 1), 1)  # the token that begins every story
    with torch.no_grad():
        return base()[0].generate(  # type: ignore[no-any-return, operator]
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0,
            min_new_tokens=LENGTH - 1, max_new_tokens=LENGTH - 1, pad_token_id=2,
        )  # fmt: skip


def surprise(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, for rows (n, length)."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def perplexity(tokens: Tensor) -> Callable[[nn.Module], float]:
    """The measure for these rows."""

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        total = sum(surprise(model, some).item() * len(some) for some in tokens.split(32))
        return math.exp(total / len(tokens))

    return measure


def stream(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches of rows that begin anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    text = tokens.flatten()
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH)]


def experiment(split: Callable[[], Split]) -> Experiment:
    """A new language."""
    train, validation, test = (rows(text) for text in split())
    text = {"validation": validation[:96], "test": test, "base's own": told()}
    marks = {title: perplexity(some) for title, some in text.items()}
    return Experiment(
        make, partial(stream, train), marks["validation"], judged_by(marks), higher_is_better=False, loss=surprise
    )


def lora(rank: int, lr: float) -> Arm:
    """An adapter on every linear layer, the head too, whose weight is the embedding's and stays as it is."""
    return Arm(f"LoRA r={rank} lr={lr:g}", low_rank(lk.LoRA(rank), "all-linear"), Recipe(lr, seconds=BUDGET))


def full(lr: float) -> Arm:
    """Full fine-tuning."""
    return Arm(f"full lr={lr:g}", everything, Recipe(lr, seconds=BUDGET))


CANDIDATES = [
    *(full(lr) for lr in (1e-3, 3e-3, 1e-2)),
    *(lora(rank, lr) for rank in (8, 16) for lr in (3e-3, 1e-2)),
    lora(32, 1e-2),
    lora(16, 2e-2),
]
ARMS = [full(3e-3), lora(16, 1e-2)]


def main() -> None:
    """The command line."""
    domains = {"Shakespeare": shakespeare, "SQL": sql}
    command_line(__doc__ or "", {name: partial(experiment, split) for name, split in domains.items()}, ARMS, CANDIDATES)


if __name__ == "__main__":
    main()
