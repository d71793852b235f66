"""`lorakit chat`: a conversation with a base and its adapters, which are switched inside it."""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.common import counted
from lorakit.cli.language import (
    BASE,
    Adapters,
    Attention,
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
    noted,
    open_model,
    shown,
    strict_stdin,
)
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.finetune.generation.conversation import Conversation
    from lorakit.finetune.generation.generate import Chosen
    from lorakit.finetune.generation.steps import Sampling

HELP = """/use js               who answers from now on: an adapter, or base
/use sql=0.7+js=0.3   several at once, with strengths
/adapters             who is there
/load NAME=PATH       one more adapter
/system TEXT          what the model is told first; without a text, nothing
/reset                forget what was said
/quit                 end, as Ctrl-D does; Ctrl-C stops an answer
//text                a line that begins with /"""


def chat(
    model: Model,
    adapter: Adapters = None,
    use: Annotated[str | None, typer.Option(help="Who answers at first; by default the first adapter.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
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
    """Talk with a model, and switch its adapters while you do: /use js; /help lists what else there is.

    Lines are read from stdin too, one question each.
    """
    from lorakit.finetune.generation.conversation import Conversation
    from lorakit.finetune.generation.steps import Sampling

    ends = tuple(escaped(text) for text in stop or ())
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, ends)
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
    strict_stdin()
    who = use if use is not None else next(iter(opened.names), BASE)
    conversation = Conversation(opened.asked(_chosen(who, opened.names)), max_new_tokens)
    if system is not None and not conversation.remembers:
        raise LorakitError(
            "--system needs a chat template, and there is none: leave it away, or give --template chatml"
        )
    conversation.system = system
    session = Session(opened, conversation, sampling, verify)
    session.use(who)
    session.run()


class Session:
    """A chat at a terminal, or with lines that are piped in."""

    def __init__(self, opened: Opened, conversation: "Conversation", sampling: "Sampling", verify: str) -> None:
        self._opened, self._conversation, self._sampling, self._verify = opened, conversation, sampling, verify
        self._chosen: Chosen = None
        self._seen = True
        self._commands: dict[str, Callable[[str], None]] = {
            "/use": self._use,
            "/adapters": lambda rest: self._adapters(),
            "/load": self._load,
            "/system": self._system,
            "/reset": lambda rest: self._reset(),
            "/help": lambda rest: print(HELP, flush=True),
        }

    def run(self) -> None:
        """Read lines and answer them until there are no more."""
        self._note_memory()
        while (line := self._line()) is not None:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._handle(line)
            except LorakitError as error:
                print(f"({error})", flush=True)

    def use(self, text: str) -> None:
        """Choose who answers.

        Raises:
            LorakitError: there is nobody of that name, or adapters that cannot act together.
        """
        from lorakit.finetune.generation.generate import acting

        chosen = _chosen(text, self._opened.names)
        with acting(self._opened.base.model, chosen):
            self._chosen = chosen
        self._opened.note_mixture(chosen)
        self._conversation.prompter = self._opened.asked(chosen)

    def _note_memory(self) -> None:
        """Say it if what was said is no longer seen, or is again."""
        prompter, seen = self._conversation.prompter, self._conversation.remembers
        if seen != self._seen:
            own = prompter.base.tokenizer.chat_template is None and prompter.template is None
            why = "there is no chat template" if own else f"prompts are taken as {prompter.kind}"
            lost = f"each line is continued by itself, and nothing is remembered: {why}"
            print(f"({'what was said is seen again' if seen else lost})", flush=True)
        self._seen = seen

    def _line(self) -> str | None:
        """The next line; None at the end."""
        while True:
            try:
                if sys.stdin.isatty():
                    return input(f"{label_of(self._chosen)}> ")
                line = sys.stdin.readline()
                return line.rstrip("\r\n").removeprefix("\ufeff") if line else None
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D ends)", flush=True)
            except UnicodeDecodeError as error:
                raise LorakitError(f"stdin is no UTF-8: {error}") from None

    def _handle(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return
        word, _, rest = line.strip().partition(" ")
        if word not in self._commands:
            near = get_close_matches(word, self._commands, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them."
            raise LorakitError(f"there is no command {word}; {hint} A line that begins with / is given as //")
        self._commands[word](rest.strip())

    def _answer(self, text: str) -> None:
        from lorakit.finetune.generation.generate import Request, generate

        ready = self._conversation.asked(text)
        if ready.dropped:
            number = self._conversation.forgotten
            fits = "fits, and is" if number == 1 else "fit, and are"
            print(f"({counted(number, 'turn')} no longer {fits} forgotten)", flush=True)
        pieces: list[str] = []

        def heard(row: int, piece: str) -> None:
            pieces.append(piece)
            print(shown(piece), end="", flush=True)

        try:
            generate(
                self._opened.base,
                [Request(ready.tokens, self._chosen, self._conversation.prompter.ends())],
                self._sampling,
                heard=heard,
            )
            print(flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
        except LorakitError:
            self._conversation.unasked()
            raise
        self._conversation.answered("".join(pieces))

    def _use(self, rest: str) -> None:
        if rest:
            self.use(rest)
        print(f"({label_of(self._chosen)} answers)", flush=True)
        self._note_memory()

    def _adapters(self) -> None:
        from lorakit.resident import adapters

        resident = adapters(self._opened.base.model)
        for name in (*self._opened.names, BASE):
            what = f"  {resident[name].variant}, {resident[name].parameters:,} numbers" if name in resident else ""
            print(f"{'*' if _acts(name, self._chosen) else ' '} {name}{what}", flush=True)

    def _load(self, rest: str) -> None:
        from lorakit.finetune.generation.adapters import named_path

        if not rest:
            raise LorakitError("which adapter? /load NAME=PATH")
        name, path = named_path(rest)
        if name == BASE:
            raise LorakitError(f"{BASE!r} is the base alone: call the adapter otherwise")
        with noted():
            loaded, note = self._opened.load(path, name, self._verify)
        print(f"({note or f'{loaded} is there'}; /use {loaded})", flush=True)

    def _system(self, rest: str) -> None:
        if not self._conversation.remembers:
            raise LorakitError("there is no chat template, and so no place for it")
        self._conversation.system = rest or None
        print("(told)" if rest else "(told nothing)", flush=True)

    def _reset(self) -> None:
        self._conversation.reset()
        print("(forgotten)", flush=True)


def _chosen(text: str, names: Sequence[str]) -> "Chosen":
    """As `generate` has it, sql=0.7+js=0.3, or with commas."""
    return chosen_of(text, names, "," if "," in text else "+")


def _acts(name: str, chosen: "Chosen") -> bool:
    if chosen is None:
        return name == BASE
    names: Sequence[str] = [chosen] if isinstance(chosen, str) else list(chosen)
    return name in names
