"""`lorakit digits`: the experiment on handwritten digits, from nothing to a report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


class Data(str, Enum):
    """Which digits to use."""

    auto = "auto"
    mnist = "mnist"
    bundled = "bundled"


def digits(
    data: Annotated[
        Data, typer.Option(help="MNIST, the small digits that come with scikit-learn, or what can be had.")
    ] = Data.auto,
    data_dir: Annotated[Path | None, typer.Option(help="A directory with MNIST's four IDX files.")] = None,
    digit: Annotated[int | None, typer.Option(help="The digit to improve; by default the base's worst.")] = None,
    batches: Annotated[int, typer.Option(help="Batches of ten images to train an adapter on.")] = 100,
    rehearse: Annotated[float, typer.Option(help="Share of other digits in the rehearsed adapter's batches.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers on one machine.")] = 0,
    out: Annotated[Path, typer.Option(help="Where results, report, base and adapters go.")] = Path("runs/digits"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the base anew, though it is there.")] = False,
) -> None:
    """Pretrain a digit classifier, mend its worst digit with LoRA of rank 1, and prove what LoRA promises."""
    start = time.perf_counter()
    import json

    from rich.console import Console

    from lorakit.digits import experiment
    from lorakit.digits.config import Config, check, make_writable
    from lorakit.digits.data import load
    from lorakit.storage import write_whole

    config = Config(out, digit, batches, rehearse, seed, fresh)
    check(config)
    console = Console(highlight=False, soft_wrap=True)
    dataset = load(data.value, data_dir)
    make_writable(out)
    console.print(f"data: {dataset.why}")
    run = experiment.run(config, dataset, _Terminal(console), start)
    _show(console, run.results)
    write_whole(out / "results.json", json.dumps(run.results, indent=2).encode())
    with console.status("drawing the report") if console.is_terminal else _nothing():
        from lorakit.digits.report import page

        write_whole(out / "report.html", page(run).encode())
    console.print(
        f"written: {out / 'report.html'}, {out / 'results.json'}, {out / 'base.safetensors'}, {out / 'adapters'}"
    )
    if not run.ok:
        failed = [name for name, holds in run.results["proofs"].items() if not holds]
        console.print(f"FAILED: {', '.join(failed)}")
        raise typer.Exit(1)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Terminal:
    """Bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: "Console") -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        if not self.console.is_terminal:
            self.console.print(text)
            yield lambda: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)


def _show(console: "Console", r: dict[str, Any]) -> None:
    """The results as tables."""
    from lorakit.digits.words import PROOFS, duration
    from lorakit.tables import shape, size

    digit, parameters, files, switch = r["digit"], r["parameters"], r["files"], r["switch"]
    _table(
        console,
        f"LoRA of rank 1: {parameters['lora']:,} numbers beside {parameters['base']:,}: {parameters['percent']:.3f}%",
        ["layer", "W", "B", "A"],
        [[row["name"], shape(row["weight"]), shape(row["B"]), shape(row["A"])] for row in r["layers"]],
    )
    _table(
        console,
        f"wrong answers on {r['images']['test']:,} test images",
        ["", *map(str, range(10)), "accuracy"],
        [
            [label, *map(str, r[key]["wrong"]), f"{r[key]['accuracy']:.2%}"]
            for key, label in (
                ("base", "base"),
                ("adapted", "adapted"),
                ("disabled", "disabled"),
                ("merged", "merged"),
                ("rehearsed", "rehearsed"),
            )
        ],
    )
    _table(
        console,
        "one adapter for each digit: wrong answers on that digit",
        ["", *(str(row["digit"]) for row in r["one_for_each"])],
        [
            ["without", *(str(row["wrong_before"]) for row in r["one_for_each"])],
            ["with its own", *(str(row["wrong_after"]) for row in r["one_for_each"])],
        ],
    )
    _table(
        console,
        f"the adapter for the {digit} at other strengths",
        ["strength", "accuracy", f"wrong {digit}s"],
        [[f"{row['strength']:.1f}", f"{row['accuracy']:.2%}", str(row["wrong"])] for row in r["sweep"]],
    )
    best = r["best_strength"]
    console.print(
        f"best strength on held-out images: {best['strength']:g}: {best['accuracy']:.2%} right on the test images, "
        f"{best['wrong']} wrong {digit}s"
    )
    console.print(
        f"on disk: base {size(files['base_bytes'])}, adapter {size(files['adapter_bytes'])}; optimizer state: full "
        f"fine-tuning {size(files['optimizer_bytes_full'])}, LoRA {size(files['optimizer_bytes_lora'])}"
    )
    console.print(
        f"switching among {switch['adapters']} adapters: {duration(switch['seconds_per_switch'])}; reading the base "
        f"again: {duration(switch['seconds_reload_base'])}"
    )
    for name, holds in r["proofs"].items():
        console.print(f"{'[green]holds[/]' if holds else '[bold red]FAILS[/]'}  {PROOFS[name]}")
    console.print(f"seconds: {r['seconds']['total']:.1f} in all, {r['seconds']['adapt']:.1f} to train the adapter")


def _table(console: "Console", title: str, headers: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lorakit.tables import table

    if not console.is_terminal:
        console.print(f"\n{title}\n{table(headers, rows, right=headers[1:])}", markup=False)
        return
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for header in headers:
        shown.add_column(header, justify="left" if header == headers[0] else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
