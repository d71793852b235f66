"""The command line: one module per verb, each importing its part only when it runs."""

import sys

import typer

from lorakit.cli.digits import digits
from lorakit.cli.svd import svd
from lorakit.errors import LorakitError

app = typer.Typer(
    help="LoRA for any PyTorch model.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _root() -> None:
    """LoRA for any PyTorch model."""


app.command()(digits)
app.command()(svd)


def main() -> None:
    """Run the command line: input that cannot be used is one line and exit code 2, not a traceback."""
    try:
        app()
    except LorakitError as error:
        print(f"lorakit: {error}", file=sys.stderr)
        sys.exit(2)
