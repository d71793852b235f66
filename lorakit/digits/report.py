"""The experiment as one self-contained page: what was done, what came out, and the pictures."""

import html
from collections.abc import Sequence
from string import Template
from typing import Any

from lorakit.digits import pictures
from lorakit.digits.experiment import Run
from lorakit.digits.words import PROOFS, duration
from lorakit.tables import shape, size

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lorakit digits: $digit</title>
<style>
  :root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #e3e7ee; --blue: #2563eb; }
  body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); }
  body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
  h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
  h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
  p { margin: .4rem 0 .9rem; max-width: 46rem; }
  .lead, figcaption, .note { color: var(--soft); }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
  .tile { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
  .tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
  .tile span { color: var(--soft); font-size: .88rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
  th { text-align: left; color: var(--soft); font-weight: 600; font-size: .88rem; }
  th, td { padding: .32rem 1.3rem .32rem 0; border-bottom: 1px solid var(--line); }
  td.n, th.n { text-align: right; }
  figure { margin: .8rem 0 0; } figure svg { width: 100%; height: auto; }
  .yes { color: #15803d; font-weight: 600; } .no { color: #b91c1c; font-weight: 700; }
</style>
</head>
<body>
<h1>A low-rank adapter for the digit $digit</h1>
<p class="lead">$lead</p>
<div class="tiles">$tiles</div>

<h2>What was added</h2>
<p>The pretrained network is frozen. Beside each weight W stand two thin matrices, B and A, of rank 1: the layer
computes with W + B·A. B begins at zero, so at first nothing changes; then $batches batches of ten images of the
digit $digit alone train B and A.</p>
$shapes

<h2>Errors for each digit</h2>
<p>Wrong answers among the $tested test images. The adapter learned the $digit and forgot some of the other digits; the
rehearsed one saw $share other digits in each batch.</p>
$errors_table
<figure>$errors<figcaption>Fewer is better.</figcaption></figure>

<h2>How strongly to apply it</h2>
<p>An adapter can be applied with any strength: 0 is the base, 1 is as trained. $best</p>
<figure>$sweep</figure>

<h2>One adapter for each digit</h2>
<p>Ten adapters lie on one base in one process. Switching takes $switch; reading the base from disk again takes
$reload, $ratio times as long.</p>
<figure>$each<figcaption>Wrong answers on an adapter's own digit, without and with it.</figcaption></figure>

<h2>What the update looks like</h2>
<p>The singular values of each weight and of its update. The update has a single one: its rank is 1, whatever the size
of the weight.</p>
<figure>$spectra</figure>

<h2>What is kept</h2>
$files

<h2>Proofs</h2>
<p>Each was checked in this run, on the test images.</p>
$proofs
<p class="note">Data: $why. Seed $seed; pretraining $pretrain s, training the adapter $adapt s, the whole run
$total s.</p>
</body>
</html>
""")


def page(run: Run) -> str:
    """The whole page as text; it needs no other file."""
    r = run.results
    digit, switch, seconds = r["digit"], r["switch"], r["seconds"]
    best = r["best_strength"]
    return _PAGE.substitute(
        digit=digit,
        lead=html.escape(_lead(r)),
        tiles=_tiles(r),
        batches=r["batches"],
        tested=f"{r['images']['test']:,}",
        share=f"{r['rehearsed']['share']:.0%}",
        shapes=_table(
            ["layer", "W", "B", "A", "numbers in W", "numbers in B and A"],
            [
                [
                    layer["name"],
                    shape(layer["weight"]),
                    shape(layer["B"]),
                    shape(layer["A"]),
                    f"{layer['weight'][0] * layer['weight'][1]:,}",
                    f"{sum(layer['A']) + sum(layer['B']) - 2:,}",
                ]
                for layer in r["layers"]
            ],
        ),
        errors_table=_table(
            ["", *map(str, range(10)), "accuracy"],
            [
                [label, *map(str, r[key]["wrong"]), f"{r[key]['accuracy']:.2%}"]
                for key, label in (("base", "base"), ("adapted", "adapted"), ("rehearsed", "adapted, rehearsed"))
            ],
        ),
        errors=pictures.errors(r),
        best=f"On {html.escape(best['chosen_on'])}, {best['strength']:g} is best: {best['accuracy']:.2%} on the test "
        f"images, with {best['wrong']} wrong answers on the {digit}.",
        sweep=pictures.sweep(r),
        switch=duration(switch["seconds_per_switch"]),
        reload=duration(switch["seconds_reload_base"]),
        ratio=f"{switch['seconds_reload_base'] / switch['seconds_per_switch']:,.0f}",
        each=pictures.each(r),
        spectra=pictures.spectra(run),
        files=_table(
            ["", "full fine-tuning", "LoRA"],
            [
                ["trained numbers", f"{r['parameters']['base']:,}", f"{r['parameters']['lora']:,}"],
                ["file for each version", size(r["files"]["base_bytes"]), size(r["files"]["adapter_bytes"])],
                ["optimizer state", size(r["files"]["optimizer_bytes_full"]), size(r["files"]["optimizer_bytes_lora"])],
            ],
        ),
        proofs=_proofs(r),
        why=html.escape(r["why"].rstrip(".")),
        seed=r["seed"],
        pretrain=f"{seconds['pretrain']:.0f}",
        adapt=f"{seconds['adapt']:.1f}",
        total=f"{seconds['total']:.0f}",
    )


def _lead(r: dict[str, Any]) -> str:
    digit, base, adapted = r["digit"], r["base"], r["adapted"]
    return (
        f"A network of {r['parameters']['base']:,} numbers got {base['wrong'][digit]} images of the {digit} wrong. "
        f"With {r['parameters']['lora']:,} trained numbers beside it, {r['parameters']['percent']:.3f}% of its size, "
        f"{adapted['wrong'][digit]} are wrong; without them it is exactly the network it was."
    )


def _tiles(r: dict[str, Any]) -> str:
    digit = r["digit"]
    tiles = [
        (f"{r['base']['wrong'][digit]} → {r['adapted']['wrong'][digit]}", f"wrong answers on the {digit}"),
        (f"{r['parameters']['percent']:.3f}%", "trained, of all numbers"),
        (size(r["files"]["adapter_bytes"]), f"to keep, beside {size(r['files']['base_bytes'])}"),
        (duration(r["switch"]["seconds_per_switch"]), f"to switch among {r['switch']['adapters']} adapters"),
    ]
    return "".join(f'<div class="tile"><b>{number}</b><span>{text}</span></div>' for number, text in tiles)


def _proofs(r: dict[str, Any]) -> str:
    verdict = {True: '<td class="yes">holds</td>', False: '<td class="no">FAILS</td>'}
    rows = "".join(
        f"<tr><td>{html.escape(PROOFS[name])}</td>{verdict[holds]}</tr>" for name, holds in r["proofs"].items()
    )
    return f"<table><tr><th>claim</th><th></th></tr>{rows}</table>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in rest) + "</tr>"

    return f"<table>{line('th', headers)}{''.join(line('td', row) for row in rows)}</table>"
