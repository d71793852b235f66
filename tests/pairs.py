"""The README's table of pairs, from the lists that the laws run over: `make tables` writes it, a test compares it."""

import warnings
from pathlib import Path

from kinds import CASES, VARIANTS
from quantized import QUANTIZED
from torch import nn

import lorakit as lk
from lorakit.layers import KINDS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- pairs -->\n", "<!-- /pairs -->\n"

COLUMNS = {
    "LoRA": ("lora", "rslora", "gaussian", "orthogonal"),
    "PiSSA": ("pissa",),
    "OLoRA": ("olora",),
    "LoRA-GA": ("lora-ga",),
    "EVA": ("eva",),
    "LoRA-FA": ("lora-fa",),
    "DoRA": ("dora",),
    "VeRA": ("vera",),
    "LoHa": ("loha",),
    "LoKr": ("lokr", "lokr-both"),
    "AdaLoRA": ("adalora",),
    "Full, Rows": ("full", "rows"),
}


def table() -> str:
    """Kinds down, variants across; "b" where the update can sit beside the call, "w" where in the weight."""
    assert [name for names in COLUMNS.values() for name in names] == list(VARIANTS)
    models = [(case.build()[0], case.targets) for case in CASES]
    models += [(stored.build()[0], "all-linear") for stored in QUANTIZED if stored.name == "nf4"]
    seen: dict[tuple[str, str, str], set[str]] = {}
    for model, targets in models:
        for name in VARIANTS:
            for mode in ("beside", "weight", "auto"):
                for kind, applied in ways(model, targets, name, mode):
                    seen.setdefault((kind, name, applied), set()).add(mode)
    lines = [["kind of layer", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for kind in (kind.name for kind in KINDS):
        cells = []
        for names in COLUMNS.values():
            ways_of = {
                "".join(sign for sign, how in (("b", "beside"), ("w", "in the weight")) if (kind, name, how) in seen)
                for name in names
            }
            assert len(ways_of) == 1, f"{kind}: {names} differ"
            cells.append(" ".join(ways_of.pop()) or "–")
        lines.append([kind, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ways(model: nn.Module, targets: object, name: str, mode: str) -> set[tuple[str, str]]:
    """Each kind in the model that can be adapted so, and where; none if it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plan = lk.plan(model, VARIANTS[name], targets, mode=mode)
        except lk.LorakitError:
            return set()
    return {(row.kind, row.applied) for row in plan.rows}


def written() -> str:
    """The README with the table as it should be."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(written(), encoding="utf-8")
