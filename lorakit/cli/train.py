"""`lorakit train`: from a configuration to an adapter; `lorakit init`: a configuration with every setting."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.finetune.settings import Settings

ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands whose further words are settings."""


def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="As `lorakit init` writes it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show what came of it, and nothing else.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="List the settings, and stop.")] = False,
) -> None:
    """Train an adapter for a language model.

    Every setting can be given as key=value or --key value, with a configuration or without one:

    lorakit train sql.yaml rank=8

    lorakit train --model path/to/model --data sql.jsonl --resume auto
    """
    if settings:
        _list_settings()
        return
    asked = settings_from(config, context.args)
    from lorakit.finetune.training.progress import Line, duration

    if dry_run:
        from lorakit.finetune.quiet import quiet_imports

        quiet_imports()
        from lorakit.finetune.training.rehearsal import rehearse

        rehearse(asked, Line())
        return
    from lorakit.finetune.training.run import train as run

    outcome = run(asked, Line(quiet=quiet))
    if not outcome.first:
        return
    loss = "" if outcome.eval_loss is None else f", validation loss {outcome.eval_loss:.4f}"
    print(f"{outcome.adapter}: step {outcome.step} of {outcome.steps}{loss}; the run took {duration(outcome.seconds)}")
    if outcome.stopped is not None:
        signalled = outcome.stopped.startswith("SIG")
        print(f"lorakit: stopped: {outcome.stopped}{'; resume=auto goes on' if signalled else ''}", file=sys.stderr)
        if signalled:
            raise typer.Exit(128 + getattr(signal, outcome.stopped.split()[0]))


def init(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="The file to write.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a configuration for `lorakit train`: every setting with its default and what it means."""
    _needed()
    from lorakit.finetune.config import checked, parse_words, template
    from lorakit.storage import write_whole

    path, words = _split(path, context.args)
    given = parse_words(words)
    checked({"model": "path/to/model", "data": "train.jsonl", **given}, "the command line")
    out = Path(path or "lora.yaml")
    if out.exists() and not force:
        raise LorakitError(f"{out} is there already, and is left as it is; --force replaces it")
    write_whole(out, template(given).encode())
    print(
        f"{out}: fill in model and data, look at the plan (lorakit train {out} --dry-run), train (lorakit train {out})"
    )


def settings_from(config: str | None, words: list[str]) -> "Settings":
    """The settings that a command was given.

    Raises:
        LorakitError: they are none, or what reads them is not installed.
    """
    _needed()
    from lorakit.finetune.config import load

    path, left = _split(config, words)
    return load(None if path is None else Path(path), left)


def _split(first: str | None, words: list[str]) -> tuple[str | None, list[str]]:
    """The file, if the first word names one, and the settings."""
    if first is not None and (first.startswith("-") or ("=" in first and not Path(first).exists())):
        return None, [first, *words]
    return first, list(words)


def _needed() -> None:
    """Whether what fine-tuning needs is installed.

    Raises:
        LorakitError: it is not.
    """
    from importlib.util import find_spec

    missing = [name for name in ("yaml", "pydantic", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise LorakitError(f"{', '.join(missing)} is not installed: pip install 'lorakit[llm]'")


def _list_settings() -> None:
    _needed()
    from lorakit.finetune.config import described

    groups: list[tuple[str, list[tuple[str, str, str]]]] = described()
    width = max(len(f"{name}={default}") for _, rows in groups for name, default, _ in rows)
    for title, rows in groups:
        print(title)
        for name, default, says in rows:
            print(f"  {f'{name}={default}'.ljust(width)}  {says}")
