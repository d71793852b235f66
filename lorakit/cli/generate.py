"""`lorakit generate`: prompts continued by a base and its adapters, several of each in one batch."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import counted, progress
from lorakit.cli.language import (
    Adapters,
    Attention,
    BatchSize,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Opened,
    Quantize,
    Raw,
    Repetition,
    Revision,
    Seed,
    Stop,
    Temperature,
    Template,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
    chosen_of,
    escaped,
    label_of,
    open_model,
    say,
    settings_of,
    shown,
    strict_stdin,
)
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.finetune.generation.files import Prompt
    from lorakit.finetune.generation.generate import Answer, Chosen, Request
    from lorakit.finetune.generation.steps import Sampling

_AT_ONCE = 8
"""Batches whose answers are shown together: they are sorted by length."""


def generate(
    model: Model,
    words: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to continue.")] = None,
    adapter: Adapters = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt too; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; or rows as for training (.jsonl, .csv, …); - is stdin.")
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(metavar="sql,js,base", help="Who continues each prompt; also a mixture: sql=0.7+js=0.3."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", "--side-by-side", help="The base too, beside the adapters.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show words as they come, one answer after the other.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each answer.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    batch_size: BatchSize = 16,
    raw: Raw = False,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attention: Attention = None,
    verify: Verify = "sample",
) -> None:
    """Continue prompts, with the base, an adapter or several.

    lorakit generate runs/sql "How many rivers are there?"

    lorakit generate MODEL --adapter sql=runs/sql --adapter js=adapters/js --prompt A --prompt B --compare
    """
    given = [*(words or ()), *(prompt or ())]
    if not given and file is None:
        raise LorakitError("which prompt? Give some, or --file with one a line")
    if stream and as_json:
        raise LorakitError("--stream and --json do not go together: leave one away")
    from lorakit.finetune.generation.generate import Request, numbered
    from lorakit.finetune.generation.steps import Sampling

    sampling = Sampling(
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        seed,
        tuple(escaped(text) for text in stop or ()),
    )
    prompts = _prompts(given, file, settings_of(model, adapter).get("columns") or {})
    opened = open_model(
        model,
        adapter,
        device=device,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attention=attention,
        verify=verify,
        template=template,
        raw=raw,
    )
    chosen = _chosen(use, compare, opened.names)
    for who in chosen:
        opened.note_mixture(who)
    askers = [(who, prompter, prompter.ends()) for who in chosen if (prompter := opened.asked(who, chosen))]
    requests = numbered(
        Request(prompter.tokens(each.content, each.where), who, ends)
        for each in prompts
        for who, prompter, ends in askers
    )
    if stream or (len(requests) == 1 and sys.stdout.isatty() and not as_json):
        _stream(opened, prompts, chosen, requests, sampling)
        return
    _note_apart(opened, chosen)
    step = max(1, _AT_ONCE * batch_size // len(chosen)) * len(chosen)
    for start in range(0, len(requests), step):
        answers = _answers(opened, requests[start : start + step], sampling, batch_size)
        some = prompts[start // len(chosen) : (start + step) // len(chosen)]
        if as_json:
            _print_json(some, chosen, answers)
        elif compare and sys.stdout.isatty():
            _print_table(some, chosen, answers)
        else:
            _print_blocks(some, chosen, answers, alone=len(requests) == 1)


def _prompts(given: Sequence[str], file: Path | None, columns: Mapping[str, str]) -> "list[Prompt]":
    from lorakit.finetune.generation.files import Prompt, prompts_at, read_prompts

    found = [Prompt(text, text, f"prompt {number}") for number, text in enumerate(given, 1)]
    if file is not None:
        found += read_prompts(_piped(), "stdin") if str(file) == "-" else prompts_at(file, columns)
    return found


def _piped() -> list[str]:
    strict_stdin()
    try:
        return list(sys.stdin)
    except UnicodeDecodeError as error:
        raise LorakitError(f"stdin is no UTF-8: {error}") from None


def _chosen(use: str | None, compare: bool, names: Sequence[str]) -> "list[Chosen]":
    """Who continues each prompt."""
    chosen: list[Chosen]
    if use is None:
        chosen = list(names) or [None]
    else:
        chosen = [chosen_of(word, names, "+") for word in use.split(",") if word.strip()]
        if not chosen:
            raise LorakitError(f"--use {use!r} names nobody: give names of adapters, or base")
    if compare and None not in chosen:
        chosen = [None, *chosen]
    if compare and len(chosen) == 1:
        raise LorakitError("there is nothing to compare the base with: give an --adapter")
    labels = [label_of(who) for who in chosen]
    if len(set(labels)) < len(labels):
        raise LorakitError(f"--use {use!r} names one twice")
    return chosen


def _note_apart(opened: Opened, chosen: "Sequence[Chosen]") -> None:
    """Say so if these adapters cannot share a batch: it takes longer, and gives the same."""
    from lorakit.finetune.generation.generate import unmixable

    if len(chosen) > 1 and (reason := unmixable(opened.base.model, chosen)) is not None:
        say(f"one adapter after the other, as they cannot share a batch: {reason.partition(';')[0]}")


def _answers(opened: Opened, requests: "Sequence[Request]", sampling: "Sampling", batch_size: int) -> "list[Answer]":
    from lorakit.finetune.generation.generate import generate as answers_to

    with progress("Generating") as bar:
        task = bar.add_task("", total=len(requests))
        return answers_to(
            opened.base,
            requests,
            sampling,
            batch_size=batch_size,
            finished=lambda i, answer: bar.advance(task),
        )


def _stream(
    opened: Opened,
    prompts: "Sequence[Prompt]",
    chosen: "Sequence[Chosen]",
    requests: "Sequence[Request]",
    sampling: "Sampling",
) -> None:
    from lorakit.finetune.generation.generate import generate as answers_to

    for i, request in enumerate(requests):
        if len(requests) > 1:
            if i % len(chosen) == 0:
                print(f"{_heading(prompts[i // len(chosen)])}\n")
            print(f"--- {label_of(request.adapter)}", flush=True)
        answers_to(
            opened.base,
            [request],
            sampling,
            heard=lambda row, piece: print(shown(piece), end="", flush=True),
        )
        print("\n" if i + 1 < len(requests) else "", flush=True)


def _print_json(prompts: "Sequence[Prompt]", chosen: "Sequence[Chosen]", answers: "Sequence[Answer]") -> None:
    for i, answer in enumerate(answers):
        line = {
            "prompt": prompts[i // len(chosen)].text,
            "adapter": label_of(chosen[i % len(chosen)]),
            "text": answer.text,
            "tokens": len(answer.tokens),
            "ended": answer.ended,
            "seconds": round(answer.seconds, 4),
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _print_blocks(
    prompts: "Sequence[Prompt]", chosen: "Sequence[Chosen]", answers: "Sequence[Answer]", alone: bool
) -> None:
    for i, answer in enumerate(answers):
        if not alone and i % len(chosen) == 0:
            print(f"{_heading(prompts[i // len(chosen)])}\n")
        if len(chosen) > 1:
            print(f"--- {label_of(chosen[i % len(chosen)])}")
        print(shown(answer.text), end="\n" if alone else "\n\n", flush=True)


def _heading(prompt: "Prompt") -> str:
    first, _, more = prompt.text.strip().partition("\n")
    lines = counted(more.count("\n") + 1, "more line")
    return f"=== {shown(first)}{f' … ({lines})' if more else ''}"


def _print_table(prompts: "Sequence[Prompt]", chosen: "Sequence[Chosen]", answers: "Sequence[Answer]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_lines=True, header_style="bold", expand=True)
    grid.add_column("prompt", overflow="fold", ratio=1, style="dim")
    for who in chosen:
        grid.add_column(label_of(who), overflow="fold", ratio=2)
    for i, prompt in enumerate(prompts):
        mine = answers[i * len(chosen) : (i + 1) * len(chosen)]
        grid.add_row(Text(shown(prompt.text)), *(Text(shown(answer.text.strip("\n"))) for answer in mine))
    Console().print(grid)
