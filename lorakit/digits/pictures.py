"""The report's pictures, each as SVG text."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorakit.digits.experiment import Run

BASE, ADAPTED, REHEARSED, CHOSEN = "#8a94a6", "#2563eb", "#0d9488", "#c2410c"


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(
        out, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    return out.getvalue()[out.getvalue().index("<svg") :]


def _axes(columns: int = 1, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#c4cad4")
        ax.tick_params(colors="#5b6675")
        ax.grid(axis="y", color="#e3e7ee", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _bars(ax: Axes, groups: Sequence[tuple[str, str, Sequence[int]]], label: str) -> None:
    width = 0.8 / len(groups)
    for i, (name, color, values) in enumerate(groups):
        places = [digit + (i - (len(groups) - 1) / 2) * width for digit in range(10)]
        bars = ax.bar(places, values, width * 0.92, color=color, label=name)
        ax.bar_label(bars, fontsize=7, color="#5b6675", padding=1)
    ax.set_xticks(range(10))
    ax.set_xlabel("digit")
    ax.set_ylabel(label)
    ax.legend(frameon=False)


def errors(r: dict[str, Any]) -> str:
    """Wrong answers for each digit: base, adapted, rehearsed."""
    figure, (ax,) = _axes()
    groups = [
        ("base", BASE, r["base"]["wrong"]),
        ("adapted", ADAPTED, r["adapted"]["wrong"]),
        ("adapted, rehearsed", REHEARSED, r["rehearsed"]["wrong"]),
    ]
    _bars(ax, groups, "wrong answers")
    return _svg(figure)


def each(r: dict[str, Any]) -> str:
    """Wrong answers of ten adapters on their own digits."""
    figure, (ax,) = _axes()
    rows = r["one_for_each"]
    groups = [
        ("without", BASE, [row["wrong_before"] for row in rows]),
        ("with the digit's own adapter", ADAPTED, [row["wrong_after"] for row in rows]),
    ]
    _bars(ax, groups, "wrong on that digit")
    return _svg(figure)


def sweep(r: dict[str, Any]) -> str:
    """Accuracy, and errors on the digit, against strength."""
    figure, (accuracy, wrong) = _axes(2)
    strengths = [row["strength"] for row in r["sweep"]]
    accuracy.plot(strengths, [100 * row["accuracy"] for row in r["sweep"]], "o-", color=ADAPTED, ms=4, label="test")
    heldout = [100 * row["heldout_accuracy"] for row in r["sweep"]]
    accuracy.plot(strengths, heldout, "o--", color=BASE, ms=3, label="held out")
    accuracy.set_ylabel("accuracy over all digits, %")
    wrong.plot(strengths, [row["wrong"] for row in r["sweep"]], "o-", color=ADAPTED, ms=4, label="test")
    wrong.set_ylabel(f"wrong answers on the {r['digit']}")
    wrong.set_ylim(bottom=0)
    for ax in (accuracy, wrong):
        ax.set_xlabel("strength")
        ax.axvline(r["best_strength"]["strength"], color=CHOSEN, linewidth=1, linestyle=":", label="chosen on held out")
        ax.legend(frameon=False)
    return _svg(figure)


def spectra(run: Run) -> str:
    """Singular values of each weight and of its update."""
    figure, axes = _axes(len(run.spectra))
    for ax, (layer, (weight, update)) in zip(axes, run.spectra.items(), strict=True):
        places = range(1, len(weight) + 1)
        ax.plot(places, weight.tolist(), color=BASE, label="W")
        ax.plot(range(1, len(update) + 1), update.tolist(), "o", color=ADAPTED, label="B·A")
        ax.set_yscale("log")
        ax.set_xscale("log")
        ax.set_title(layer, loc="left", fontsize=10)
        ax.set_xlabel("index")
        ax.legend(frameon=False)
    axes[0].set_ylabel("singular value")
    return _svg(figure)
