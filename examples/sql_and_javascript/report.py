"""What came of the story: a table for a terminal, `report.md`, `results.json` and a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.sql_and_javascript.measures import Score
from examples.sql_and_javascript.together import Laws
from lorakit.storage import write_whole
from lorakit.tables import size, table

SETS = {"geography": "Geography", "atis": "ATIS", "staff": "staff", "javascript": "JavaScript"}
SAYS = {
    "base_untouched": "the base, in memory and on disk, has the bits it had before",
    "disabled_is_base": "with both loaded and none acting, the logits are the base's to the bit",
    "switched_is_alone": "switched to, each is to the bit what it is on a base of its own",
    "mixed_is_alone": "in a mixed batch each row is what it is alone, and so is its text",
}


@dataclass(frozen=True)
class Arm:
    """A model or an adapter, and what it can do."""

    name: str
    trained: int
    """Numbers."""
    bytes: int
    """On disk, of the weights and their configs."""
    seconds: float | None
    """Of training."""
    rate: float | None
    """The learning rate."""
    validation: float | None
    """Its loss on the validation part of its own task."""
    scores: Mapping[str, Score]
    """By set."""


@dataclass(frozen=True)
class Story:
    """All of it."""

    base: str
    parameters: int
    arms: Sequence[Arm]
    laws: Laws
    samples: Sequence[Mapping[str, str]]
    """Prompts, and by arm what was written."""
    notes: Sequence[str]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    sweep: Sequence[Mapping[str, Any]] = field(default=())


def scores_table(story: Story) -> str:
    """Perplexity, exact matches and results when run of each arm on each set."""
    sets = list(story.arms[0].scores)
    runs = {name: story.arms[0].scores[name].right is not None for name in sets}
    columns = [""]
    for name in sets:
        columns += [f"{SETS[name]} ppl", "exact", *(["run"] if runs[name] else [])]
    rows = []
    for arm in story.arms:
        row = [arm.name]
        for name in sets:
            score = arm.scores[name]
            row += [number(score.perplexity), percent(score.exact), *([percent(score.right)] if runs[name] else [])]
        rows.append(row)
    return table(columns, rows, right=columns[1:])


def costs_table(story: Story) -> str:
    """What each arm takes: numbers, bytes, seconds."""
    columns = ["", "trained numbers", "on disk", "training", "learning rate", "validation loss"]
    rows = [
        [
            arm.name,
            f"{arm.trained:,}" if arm.trained else "-",
            size(arm.bytes),
            "-" if arm.seconds is None else f"{arm.seconds:.1f} s",
            "-" if arm.rate is None else f"{arm.rate:g}",
            "-" if arm.validation is None else f"{arm.validation:.3f}",
        ]
        for arm in story.arms
    ]
    return table(columns, rows, right=columns[1:])


def page(story: Story) -> str:
    """The report, in Markdown whose tables are readable as they are."""
    laws = [f"- {'holds' if getattr(story.laws, name) else '**FAILS**'}: {says}" for name, says in SAYS.items()]
    two_models = 2 * next(arm.bytes for arm in story.arms if arm.name == "base")
    adapters = sum(arm.bytes for arm in story.arms if arm.name.endswith("adapter"))
    one = two_models // 2 + adapters
    parts = [
        "# SQL and JavaScript on one base\n",
        f"The base: {story.base}, {story.parameters:,} numbers.\n",
        _block(scores_table(story)),
        "ppl: perplexity for each token of the completions to test. exact: completions written letter by letter. "
        "run: completions that give the gold code's results when run.\n",
        _block(costs_table(story)),
        f"One base with both adapters: {size(one)} on disk; two fine-tuned models: {size(two_models)}. Switching takes "
        f"{story.laws.switch_seconds * 1e6:.1f} µs.\n",
        "\n".join(laws),
        f"\nIn the mixed batch logits differ by {story.laws.largest_difference:.1e} at most (rounding), and "
        f"{story.laws.texts_equal} of {story.laws.texts} texts are equal.\n",
        "## The same prompts\n",
        _block("\n\n".join(_sample(sample) for sample in story.samples)),
        "## The data\n",
        "\n".join(f"- {note}" for note in story.notes),
        "",
    ]
    if story.sweep:
        parts += ["## Learning rates tried\n", _block(sweep_table(story.sweep))]
    return "\n".join(parts)


def sweep_table(tried: Sequence[Mapping[str, Any]]) -> str:
    """Validation losses of the rates that were tried."""
    columns = ["", "learning rate", "steps", "validation loss"]
    rows = [[row["arm"], f"{row['rate']:g}", str(row["steps"]), f"{row['validation']:.3f}"] for row in tried]
    return table(columns, rows, right=columns[1:])


def write(story: Story, out: Path) -> None:
    """`report.md`, `results.json`, and `scores.png` if matplotlib is there."""
    write_whole(out / "report.md", page(story).encode())
    write_whole(out / "results.json", json.dumps({**asdict(story), "holds": story.laws.hold()}, indent=1).encode())


def number(value: float) -> str:
    """Three digits of a perplexity."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def percent(share: float | None) -> str:
    """12.3%."""
    return "-" if share is None else f"{share:.1%}"


def _sample(sample: Mapping[str, str]) -> str:
    width = max(len(name) for name in sample)
    lines = (f"{name.ljust(width)}  {text}" for name, text in sample.items())
    return "\n".join(line if len(line) <= 100 else f"{line[:97]}..." for line in lines)


def _block(text: str) -> str:
    return f"```\n{text}\n```\n"
