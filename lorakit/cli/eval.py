"""`lorakit eval`: perplexity and exact match of a base and its adapters on a file of examples."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lorakit.cli.common import counted, progress, show_table
from lorakit.cli.language import (
    Adapters,
    Attention,
    Device,
    Dtype,
    Model,
    Opened,
    Quantize,
    Revision,
    Template,
    TrustRemoteCode,
    Verify,
    label_of,
    open_model,
    say,
    settings_of,
    shown,
)
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.finetune.data import Encoded, Rows
    from lorakit.finetune.generation.generate import Chosen
    from lorakit.finetune.generation.prompts import Prompter
    from lorakit.finetune.generation.scoring import Question, Result, Score

_LENGTH = 1024
"""Tokens of an example at most, as in training, where nothing else is said."""


@dataclass(frozen=True)
class _Findings:
    chosen: "Chosen"
    score: "Score"
    results: "list[Result] | None"
    """None if no answers were asked for."""

    @property
    def matched(self) -> int:
        return sum(result.matched for result in self.results or ())


class _Way(NamedTuple):
    """The rows as an adapter's training would have them."""

    prompter: "Prompter"
    encoded: "Encoded"
    questions: "list[Question]"
    """Empty if no answers are asked for, or the rows have none."""


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV or Parquet, or a hub id.")],
    adapter: Adapters = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="The base alone too.")] = True,
    limit: Annotated[int | None, typer.Option(help="The first so many rows.")] = None,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Perplexity alone, which is much faster.")] = False,
    show: Annotated[int, typer.Option(help="So many answers of each that do not match.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One object of JSON.")] = False,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="prompt=question", help="Other names of columns; may be given several times."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    train_on: Annotated[
        str | None, typer.Option(help="Whose tokens perplexity is of: completion or all; by default as in the run.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example at most; longer ones are cut.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer at most; by default more than any that is expected.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 16,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = None,
    quantize: Quantize = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attention: Attention = None,
    verify: Verify = "sample",
) -> None:
    """Perplexity on the tokens that training is on, and how many answers match, for the base and each adapter.

    Answers are generated greedily and compared but for space around them, where rows have one.
    """
    least_of = {"limit": 1, "show": 0, "batch-size": 1, "max-length": 1, "max-new-tokens": 1}
    given = (limit, show, batch_size, max_length, max_new_tokens)
    for (name, least), number in zip(least_of.items(), given, strict=True):
        if number is not None and number < least:
            raise LorakitError(f"--{name} {number} must be {least} or more")
    from lorakit.finetune.generation.prompts import Prompter

    settings = settings_of(model, adapter)
    rows = _rows(data, columns, settings, split, limit)
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
        raw=False,
    )
    chosen: list[Chosen] = [*([None] if base or not opened.names else []), *opened.names]
    ways: dict[str | None, _Way] = {}
    of = {label_of(who): template or _template(opened, who, rows) for who in chosen}
    for each in of.values():
        if each not in ways:
            prompter = Prompter(opened.base, rows.kind, each)
            encoded = _encoded(prompter, rows, settings, train_on, max_length)
            ways[each] = _Way(prompter, encoded, [] if no_generate else _questions(prompter, rows))
    findings = [_findings(who, ways[of[label_of(who)]], max_new_tokens, batch_size) for who in chosen]
    if as_json:
        print(json.dumps(_as_json(data, rows, next(iter(ways.values())).encoded, findings, show), ensure_ascii=False))
        return
    print(rows)
    for each, way in ways.items():
        users = ", ".join(name for name, its in of.items() if its == each)
        print(f"{users}: {way.encoded.report}" if len(ways) > 1 else way.encoded.report)
    print()
    _show(findings)
    for found in findings:
        _show_mismatches(found, show)


def _rows(
    data: str, columns: Sequence[str] | None, settings: dict[str, Any], split: str | None, limit: int | None
) -> "Rows":
    from lorakit.finetune.data import read_rows

    wrong = [text for text in columns or () if not all(part.strip() for part in text.partition("="))]
    if wrong:
        raise LorakitError(f"--columns {wrong[0]!r} must be of the form prompt=question")
    given = {name: column for name, _, column in (text.partition("=") for text in columns or ())}
    rows = read_rows(data, columns=given or settings.get("columns") or None, split=split)
    return rows if limit is None else rows[:limit]


def _template(opened: Opened, chosen: "Chosen", rows: "Rows") -> str | None:
    """That of the adapter's training, but plain text has none."""
    return None if rows.kind == "text" else opened.asked(chosen).template


def _encoded(
    prompter: "Prompter", rows: "Rows", settings: dict[str, Any], train_on: str | None, max_length: int | None
) -> "Encoded":
    """The rows as training has them."""
    from lorakit.finetune.data import encode
    from lorakit.finetune.generation.generate import context_of

    context = context_of(prompter.base.model)
    longest = max_length or settings.get("max_length") or min(_LENGTH, context or _LENGTH)
    if context is not None and longest > context:
        raise LorakitError(f"--max-length {longest} is more than the model's context of {context}")
    how: Any = train_on or settings.get("train_on") or "completion"
    return encode(rows, prompter.base.tokenizer, max_length=longest, train_on=how, template=prompter.template)


def _questions(prompter: "Prompter", rows: "Rows") -> "list[Question]":
    from lorakit.finetune.generation.scoring import questions_of

    questions, lost = questions_of(rows, prompter)
    if lost:
        say(f"{counted(lost, 'prompt')} left no room for an answer in the model's context, and were not asked")
    return questions


def _findings(chosen: "Chosen", way: _Way, max_new_tokens: int | None, batch_size: int) -> _Findings:
    from lorakit.finetune.generation.scoring import answer_length, ask, score
    from lorakit.finetune.generation.steps import Sampling

    prompter, encoded, questions = way
    base, who = prompter.base, label_of(chosen)
    with progress(f"Scoring {who}") as bar:
        task = bar.add_task("", total=len(encoded.examples))
        scored = score(
            base, encoded.examples, chosen, batch_size=batch_size, moved=lambda done: bar.update(task, completed=done)
        )
    if not questions:
        return _Findings(chosen, scored, None)
    sampling = Sampling(max_new_tokens or answer_length(base, questions))
    with progress(f"Asking {who}") as bar:
        task = bar.add_task("", total=len(questions))
        results = ask(
            base,
            questions,
            chosen,
            sampling=sampling,
            ends=prompter.ends(),
            batch_size=batch_size,
            moved=lambda done: bar.update(task, completed=done),
        )
    return _Findings(chosen, scored, results)


def _show(findings: Sequence[_Findings]) -> None:
    asked = any(found.results is not None for found in findings)
    lines = []
    for found in findings:
        line = [label_of(found.chosen), f"{found.score.tokens:,}", f"{found.score.loss:.4f}"]
        line.append(f"{found.score.perplexity:.4g}")
        if asked:
            count = len(found.results or ())
            line.append(f"{found.matched} of {count} ({found.matched / count:.1%})")
        lines.append(line)
    show_table(["", "tokens", "loss", "perplexity", *(["exact match"] if asked else [])], lines, bad=("nan", "inf"))


def _show_mismatches(found: _Findings, most: int) -> None:
    for result in [result for result in found.results or () if not result.matched][:most]:
        print(f"\n{label_of(found.chosen)}, {result.question.where}")
        print(f"  expected: {shown(result.question.expected.strip())}\n  got:      {shown(result.got.strip())}")
        if result.answer.ended == "length":
            print("  (cut off: it did not end)")


def _as_json(data: str, rows: "Rows", encoded: "Encoded", findings: Sequence[_Findings], show: int) -> dict[str, Any]:
    results = []
    for found in findings:
        line: dict[str, Any] = {
            "adapter": label_of(found.chosen),
            "tokens": found.score.tokens,
            "loss": _number(found.score.loss),
            "perplexity": _number(found.score.perplexity),
        }
        if found.results is not None:
            wrong = [result for result in found.results if not result.matched][:show]
            line |= {
                "asked": len(found.results),
                "matched": found.matched,
                "exact_match": found.matched / len(found.results),
                "mismatches": [
                    {"where": each.question.where, "expected": each.question.expected, "got": each.got}
                    for each in wrong
                ],
            }
        results.append(line)
    return {"data": data, "rows": len(rows), "examples": len(encoded.examples), "results": results}


def _number(value: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None
