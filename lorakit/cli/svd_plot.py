"""The picture of `lorakit svd --plot`: the singular values of many weights on one pair of axes."""

import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.storage import write_whole

if TYPE_CHECKING:
    from lorakit.algebra import Spectrum

SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
LEGEND_ENTRIES = 10


def check_plot(path: Path) -> None:
    """Everything that could keep a picture from being written, before any work.

    Raises:
        LorakitError: unknown suffix, no such directory, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise LorakitError(f"cannot draw {str(path)!r}: its suffix must be one of {', '.join(SUFFIXES)}")
    if os.path.isdir(path):
        raise LorakitError(f"cannot draw {str(path)!r}: it is a directory; name a file in it")
    if not os.path.isdir(path.parent):
        raise LorakitError(f"cannot draw {str(path)!r}: there is no directory {str(path.parent)!r}; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LorakitError("drawing needs matplotlib: pip install 'lorakit[plots]'") from error


def draw(path: Path, title: str, spectra: Sequence[tuple[str, "Spectrum"]]) -> None:
    """Write the picture of named spectra, whole or not at all.

    Each is a line of σᵢ/σ₁ over i, on a logarithmic scale. Few are told apart by a legend; many by the colour of their
    depth in the model. Zeros, and what is far below rounding, would only stretch such a scale and are left out.

    Raises:
        LorakitError: there is nothing to draw, or the file cannot be written.
    """
    lines = {name: visible(spectrum) for name, spectrum in spectra if spectrum.values[0] > 0}
    if not lines:
        raise LorakitError(f"cannot draw {str(path)!r}: every weight is zero or not finite; look at the table")
    longest = max(map(len, lines.values()))
    many = len(lines) > LEGEND_ENTRIES
    entries = len(lines) if 1 < len(lines) <= LEGEND_ENTRIES else 0
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5 + 0.2 * entries), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = by_depth(figure, axes, list(lines)) if many else [f"C{i}" for i in range(len(lines))]
    for values, colour in zip(lines.values(), colours, strict=True):
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=colour,
            alpha=0.7 if many else 1.0,
            linewidth=1.2,
            marker="o" if longest <= 32 or len(values) == 1 else "",
            markersize=3,
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, longest + max(0.5, 0.01 * longest))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("i, the singular values from the largest on")
    axes.set_ylabel("σᵢ / σ₁")
    axes.set_title(title, parse_math=False)
    if entries:
        labels = [f" {name}" for name in lines]  # a label that begins with an underscore would be left out
        legend = figure.legend(axes.lines, labels, loc="outside lower center", fontsize="small", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:])
    write_whole(path, picture.getvalue())


def visible(spectrum: "Spectrum") -> list[float]:
    """σᵢ/σ₁ of the singular values that are not far below rounding."""
    import torch

    relative = spectrum.values.cpu().double() / float(spectrum.values[0])
    values: list[float] = relative[relative > torch.finfo(spectrum.values.dtype).eps / 1000].tolist()
    return values


def by_depth(figure: Any, axes: Any, names: Sequence[str]) -> list[Any]:
    """A colour for each name by the layer number in it, else by its place in the list; and the scale of colours."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    found = [re.search(r"(?<![^\W_])\d+(?![^\W_])", name) for name in names]  # a number that is a word of its own
    depths: list[int | None] = [int(number[0]) if number else None for number in found]
    label = "layer number (grey: none)" if None in depths else "layer number"
    if len({depth for depth in depths if depth is not None}) < 2:
        depths, label = list(range(1, len(names) + 1)), "weight, in the order of the table"
    numbers = [depth for depth in depths if depth is not None]
    scale: Any = ScalarMappable(Normalize(min(numbers), max(numbers)), matplotlib.colormaps["viridis"])
    figure.colorbar(scale, ax=axes, label=label, ticks=MaxNLocator(integer=True))
    return ["0.6" if depth is None else scale.to_rgba(depth) for depth in depths]
