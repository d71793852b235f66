"""A run as one self-contained page, and its losses as a picture."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from lorakit.finetune.training.groups import HEADERS, grouped
from lorakit.finetune.training.progress import duration
from lorakit.storage import write_whole
from lorakit.tables import size

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lorakit: $name</title>
<style>
  :root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #e3e7ee; }
  body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2.5rem auto; }
  body { padding: 0 1.2rem; }
  h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
  h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; }
  .lead { color: var(--soft); }
  .warn { color: #b91c1c; font-weight: 600; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
  .tile { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
  .tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
  .tile span { color: var(--soft); font-size: .88rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; width: 100%; }
  th { text-align: left; color: var(--soft); font-weight: 600; font-size: .88rem; }
  th, td { padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
  td { overflow-wrap: anywhere; }
  img { width: 100%; height: auto; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .88rem; }
  .wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>$name</h1>
<p class="lead">$lead</p>
$warning
<div class="tiles">$tiles</div>

<h2>Loss</h2>
$picture

<h2>What it writes</h2>
$samples

<h2>What was trained</h2>
<p>$plan</p>
<div class="wide">$targets</div>

<h2>Data</h2>
<pre>$data</pre>

<h2>Settings</h2>
$settings

<h2>Where it ran</h2>
$environment
</body>
</html>
""")


def write_report(
    folder: Path,
    facts: Mapping[str, Any],
    plan: Any,
    data: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write `loss.png` and `report.html`.

    Args:
        folder: the run directory.
        facts: name, base, step, steps, stopped, eval_loss, adapter_bytes, and what else is in a tile.
        plan: what was attached.
        data: what was read, as text.
        settings: as resolved.
        rows: of `metrics.jsonl`.

    Raises:
        LorakitError: they cannot be written.
    """
    picture = draw(rows)
    write_whole(folder / "loss.png", picture)
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    write_whole(folder / "report.html", page(facts, plan, data, settings, rows, picture, environment).encode())


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The losses against the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.add_axes((0.07, 0.13, 0.915, 0.83))
    for key, color, label, style in (
        ("loss", "#8a94a6", "training", "-"),
        ("eval_loss", "#2563eb", "validation", "o-"),
    ):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, ms=4, lw=1.4)
    best = min(
        (row for row in rows if row.get("eval_loss") is not None), key=lambda row: row["eval_loss"], default=None
    )
    if best is not None:
        axes.axvline(best["step"], color="#c2410c", lw=1, ls=":", label=f"best: {best['eval_loss']:.4f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss for each token, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7ee", linewidth=0.8)
    if axes.lines:
        axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()


def page(
    facts: Mapping[str, Any],
    plan: Any,
    data: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    picture: bytes,
    environment: Mapping[str, Any],
) -> str:
    """The page as text; it needs no other file."""
    warning = "" if facts["stopped"] is None else f'<p class="warn">Stopped: {html.escape(facts["stopped"])}.</p>'
    return _PAGE.substitute(
        name=html.escape(facts["name"]),
        lead=html.escape(
            f"An adapter of {plan.parameters:,} numbers for {facts['base']}, {plan.percent:.3g}% of its "
            f"{plan.base_parameters:,}, trained on {settings['data']}."
        ),
        warning=warning,
        tiles=_tiles(facts, rows),
        picture=f'<img alt="loss against steps" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        samples=_samples(rows),
        plan=html.escape(str(plan.variant)),
        targets=_table(HEADERS, grouped(plan)),
        data=html.escape(data),
        settings=_table(
            ["setting", "value"], [[key, json.dumps(value, ensure_ascii=False)] for key, value in settings.items()]
        ),
        environment=_table(["", ""], [[key, _plain(value)] for key, value in environment.items()]),
    )


def _tiles(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    tiles = [(f"{facts['step']:,} of {facts['steps']:,}", "steps")]
    evaluated = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    if evaluated:
        tiles += [
            (f"{evaluated[0]:.3f} → {min(evaluated):.3f}", "validation loss, first and best"),
            (f"{math.exp(min(min(evaluated), 700)):.4g}", "perplexity at best"),
        ]
    speeds = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    if speeds:
        tiles.append((f"{speeds[len(speeds) // 2]:,.0f}", "tokens a second, the median"))
    tiles += [(size(facts["adapter_bytes"]), "the adapter's file"), (duration(facts["seconds"]), "this process took")]
    return "".join(f'<div class="tile"><b>{html.escape(number)}</b><span>{text}</span></div>' for number, text in tiles)


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of each prompt what was written at the first evaluation, in the middle, and at the last."""
    found = [row for row in rows if row.get("samples")]
    if not found:
        return "<p>No samples were asked for.</p>"
    chosen = list({id(row): row for row in (found[0], found[len(found) // 2], found[-1])}.values())
    parts = []
    for i, sample in enumerate(chosen[0]["samples"]):
        lines = [["prompt", sample["prompt"]]]
        lines += [[f"step {row['step']}", row["samples"][i]["text"]] for row in chosen if i < len(row["samples"])]
        if sample.get("expected"):
            lines.append(["expected", sample["expected"]])
        parts.append(_table(["", ""], lines, pre=True))
    return "".join(parts)


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], pre: bool = False) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers) if any(headers) else ""
    start, end = ("<pre>", "</pre>") if pre else ("", "")
    body = "".join(
        "<tr>" + "".join(f"<td>{start}{html.escape(cell)}{end}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
