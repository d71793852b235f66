"""The command line: one module per verb, each importing its part only when it runs."""

import os
import sys
from typing import Annotated

import typer

from lorakit.cli.chat import chat
from lorakit.cli.checkpoints import extract, merge
from lorakit.cli.combine import combine, resize
from lorakit.cli.compare import compare
from lorakit.cli.convert import convert
from lorakit.cli.digits import digits
from lorakit.cli.eval import evaluate
from lorakit.cli.generate import generate
from lorakit.cli.inspect import inspect
from lorakit.cli.svd import svd
from lorakit.cli.train import ANY_WORDS, init, train
from lorakit.errors import LorakitError

STOPPED = 130  # what a shell gives for Ctrl-C

app = typer.Typer(
    help="LoRA for any PyTorch model.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("lorakit"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """LoRA for any PyTorch model."""


for command in (inspect, compare, combine, resize, extract, merge, convert, svd, digits):
    app.command()(command)
app.command(context_settings=ANY_WORDS)(init)
app.command(context_settings=ANY_WORDS)(train)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line: input that cannot be used is one line and exit code 2, not a traceback."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != STOPPED:
            raise
        print("lorakit: stopped; every file that was written is whole", file=sys.stderr)
        sys.exit(STOPPED)
    except LorakitError as error:
        rank = os.environ.get("RANK", "0")
        print(f"lorakit: {'' if rank == '0' else f'process {rank}: '}{error}", file=sys.stderr)
        sys.exit(2)
