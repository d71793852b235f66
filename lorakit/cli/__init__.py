"""The command line: one module per verb, each importing its part only when it runs."""

import sys

import typer

from lorakit.errors import LorakitError

app = typer.Typer(
    help="LoRA for any PyTorch model.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
