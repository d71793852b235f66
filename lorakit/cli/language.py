"""What the commands that use a language model share: options, opening it with its adapters, names of choices."""

import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.errors import LorakitError, printable

if TYPE_CHECKING:
    from lorakit.finetune.base import Base
    from lorakit.finetune.generation.generate import Chosen
    from lorakit.finetune.generation.prompts import Prompter

BASE = "base"
"""What the base without an adapter is called."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory with a transformers model, a hub id, a run of `lorakit train`, or an adapter.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="An adapter to load, or a run; may be given several times."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the base: float32, bfloat16, float16 or auto; by default as in the run.")
]
Quantize = Annotated[
    str | None, typer.Option(help="The base in 4bit or 8bit, by bitsandbytes; by default as in the run.")
]
Revision = Annotated[str | None, typer.Option(help="Of a hub id: a branch, a tag or a commit.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, …")]
Verify = Annotated[
    str, typer.Option(help="Whether adapters are checked against the base: sample, full (every byte) or off.")
]
Template = Annotated[
    str | None,
    typer.Option(help="For prompts: a name, a file or the template; by default as in the run, or the tokenizer's."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as plain text, without a template.")]
BatchSize = Annotated[int, typer.Option(help="Rows at once.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token; 1 draws as the model says.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability together.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 is all.")]
Repetition = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, words that were there become rarer.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text before which to end; may be given several times.")]


@dataclass(frozen=True)
class Opened:
    """A base with its adapters, and how each is asked."""

    base: "Base"
    plain: "Prompter"
    """For the base, and adapters of which it is not known how they were trained."""
    prompters: "dict[str, Prompter]"
    """By adapter, in the order in which they were given."""
    template: str | None
    """As it was given, for all."""
    raw: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were given."""
        return tuple(self.prompters)

    def asked(self, chosen: "Chosen", beside: "Sequence[Chosen]" = ()) -> "Prompter":
        """How this choice is asked: as in the training of the adapter, or of the first of several.

        The base is asked like the first adapter that it is `beside`, or else that is there.
        """
        if chosen is None:
            chosen = next((each for each in beside if each is not None), next(iter(self.prompters), None))
        if chosen is None:
            return self.plain
        return self.prompters[chosen if isinstance(chosen, str) else next(iter(chosen))]

    def note_mixture(self, chosen: "Chosen") -> None:
        """Say so if these adapters were trained in different ways, of which only one can be asked."""
        if not isinstance(chosen, Mapping):
            return
        first, *others = chosen
        odd = [name for name in others if self.prompters[name] != self.prompters[first]]
        if odd:
            trained = "was trained" if len(odd) == 1 else "were trained"
            say(f"{label_of(chosen)} is asked as {first} was trained; {', '.join(odd)} {trained} in another way")

    def load(self, path: str, name: str | None, verify: str) -> tuple[str, str | None]:
        """One more adapter: its name, and what is to be said of it.

        Raises:
            LorakitError: see `load_adapter`; or it is called like the base.
        """
        from lorakit.attach import remove
        from lorakit.finetune.generation.adapters import load_adapter

        prompter = self.trained(path)
        loaded = load_adapter(self.base.model, path, name, verify)  # type: ignore[arg-type]
        if loaded.name == BASE:
            remove(self.base.model, BASE)
            raise LorakitError(f"{BASE!r} is the base alone: call the adapter otherwise, NAME={path}")
        self.prompters[loaded.name] = prompter
        return loaded

    def trained(self, path: str) -> "Prompter":
        """How an adapter, or a run, was trained; if that is not known, as others are asked.

        Raises:
            LorakitError: its config cannot be read, or its template is none.
        """
        from lorakit.finetune.generation.prompts import prompter_of
        from lorakit.finetune.resolve import training_of

        run = None if self.raw or self.template is not None else training_of(path)
        return self.plain if run is None else prompter_of(self.base, kind=run.kind, template=run.template)


def open_model(
    where: str,
    adapters: Sequence[str] | None,
    *,
    device: str,
    dtype: str | None,
    quantize: str | None,
    revision: str | None,
    trust_remote_code: bool,
    attention: str | None,
    verify: str,
    template: str | None,
    raw: bool,
) -> Opened:
    """Open a base, load its adapters, and say on stderr what is to be said of them.

    What is not given is taken from the settings of the run, if the place is one; but never that code may run.

    Raises:
        LorakitError: the base or an adapter cannot be used.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has what a model writes
    if find_spec("transformers") is None:
        raise LorakitError("transformers is not installed: pip install 'lorakit[llm]'")
    if verify not in ("sample", "full", "off"):
        raise LorakitError(f"--verify {verify!r} must be sample, full or off")
    from lorakit.finetune.generation.adapters import named_path
    from lorakit.finetune.resolve import resolve

    resolved = resolve(where)
    given = [*((name, str(path)) for name, path in resolved.adapters.items()), *map(named_path, adapters or ())]
    from lorakit.finetune.base import open_base
    from lorakit.finetune.generation.prompts import prompter_of

    settings = resolved.settings
    with noted():
        try:
            base = open_base(
                resolved.model,
                device=device,
                dtype=dtype or settings.get("dtype") or "auto",
                quantize=quantize or settings.get("quantize"),
                revision=revision or settings.get("revision"),
                trust_remote_code=trust_remote_code,
                attention=attention or settings.get("attention"),
            )
        except LorakitError as error:
            raise _with_source(error, where, resolved.model) from None
        if not settings:  # training has said it
            for note in base.notes:
                warnings.warn(note, stacklevel=1)
        opened = Opened(base, prompter_of(base, template=template, raw=raw), {}, template, raw)
        opened = replace(opened, plain=opened.trained(where))
        for name, path in given:
            mine = "adapter" if name == BASE and path in map(str, resolved.adapters.values()) else name
            _, said = opened.load(path, mine, verify)
            if said is not None:
                warnings.warn(said, stacklevel=1)
    return opened


def _with_source(error: LorakitError, where: str, model: str) -> LorakitError:
    """If a run or an adapter names a base that is not there: who names it, and what to do."""
    from lorakit.finetune.resolve import naming

    source = naming(where)
    if source is None or (Path(model).expanduser() / "config.json").exists():
        return error
    return LorakitError(
        f"{error}\nThat is the base which {source} names. If it has moved, give its new place as MODEL, and this as an "
        f"adapter: lorakit generate NEWPLACE --adapter {where}"
    )


def settings_of(where: str, adapters: Sequence[str] | None) -> dict[str, Any]:
    """The settings of the run that a model is, or else that the first adapter is of; empty if there is none.

    Raises:
        LorakitError: the config of a run cannot be read.
    """
    from lorakit.finetune.generation.adapters import named_path
    from lorakit.finetune.resolve import resolve, training_of

    settings = resolve(where).settings
    if not settings and adapters:
        trained = training_of(named_path(adapters[0])[1])
        settings = {} if trained is None else trained.settings
    return settings


def escaped(text: str) -> str:
    """A shell gives no line end easily: a backslash and an n mean one."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def strict_stdin() -> None:
    """What is piped in is UTF-8, or an error when it is read: some locales let bytes through that are no text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        if sys.stdin.isatty():
            sys.stdin.reconfigure(errors="strict")
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")


@contextmanager
def noted() -> Iterator[None]:
    """Inside, warnings become lines on stderr."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        yield
    for text in dict.fromkeys(str(each.message) for each in found if issubclass(each.category, UserWarning)):
        say(text)


def say(text: str) -> None:
    """A line on stderr, beside what is written to stdout."""
    print(f"lorakit: {printable(text)}", file=sys.stderr)


def chosen_of(text: str, names: Sequence[str], between: str) -> "Chosen":
    """Which adapter a word means: "base", a name, or several names with strengths (sql=0.7+js=0.3).

    Args:
        text: the word.
        names: of the adapters that are loaded.
        between: what stands between two adapters that act together.

    Raises:
        LorakitError: it is none of these.
    """
    text = text.strip()
    if text == BASE:
        return None
    if text in names:
        return text
    strengths: dict[str, float] = {}
    for part in text.split(between):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name not in names:
            there = ", ".join((*names, BASE))
            raise LorakitError(f"there is no adapter {name!r}: there are {there}")
        try:
            strength = float(number) if equals else 1.0
        except ValueError:
            raise LorakitError(f"the strength of {name!r} must be a number, not {number!r}") from None
        if name in strengths:
            raise LorakitError(f"{text!r} names {name!r} twice")
        strengths[name] = strength
    return strengths


def label_of(chosen: "Chosen") -> str:
    """A choice as it is shown and given."""
    if chosen is None:
        return BASE
    return chosen if isinstance(chosen, str) else "+".join(f"{name}={strength:g}" for name, strength in chosen.items())


def shown(text: str) -> str:
    """Text of a model: it may hold anything, and on a terminal nothing in it acts."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text
