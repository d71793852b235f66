"""Templates by name, from a file or as they are given: plain ones with {prompt}, and those of chats in Jinja."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    + INSTRUCTION
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + 'END' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + 'END' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SIMPLE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant: ' }}"
    "{% generation %}{{ message['content'] + 'END' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
BUILT_IN = {"chatml": _CHATML, "simple": _SIMPLE, "instruction": INSTRUCTION, "alpaca": _ALPACA}
"""END is the tokenizer's token for the end of a turn: the model is to stop there."""

_PLACES = ("prompt", "instruction", "input", "completion", "output")
_PLACE = re.compile(r"\{([a-z_]+)\}")
_LONGEST = 4096


@dataclass(frozen=True)
class Template:
    """A template's text; `chat` tells Jinja from a plain one, `own` one of ours from a user's or a tokenizer's."""

    text: str
    chat: bool
    own: bool = False


def template_of(given: "str | None", tokenizer: "PreTrainedTokenizerBase") -> Template | None:
    """What a setting means: a name of `BUILT_IN`, a file, or the template itself; None if nothing is given.

    Raises:
        LorakitError: it is none of these, or a plain template has no place for the prompt.
    """
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip():
        raise LorakitError(f"a template must be text, not {given!r:.60}: a name, a file or the template itself")
    if given in BUILT_IN:
        text = BUILT_IN[given]
        return Template(text.replace("END", _turn_end(tokenizer)), _is_chat(text), own=True)
    text = given if "{" in given else _read(given)
    chat = _is_chat(text)
    if not chat:
        _check_plain(text)
    return Template(text, chat)


def _is_chat(text: str) -> bool:
    return "{{" in text or "{%" in text


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> str:
    """ChatML's own token where the tokenizer has it as one, else what ends a text."""
    end = "<|im_end|>"
    return end if end in tokenizer.get_added_vocab() else str(tokenizer.eos_token or "")


def _read(given: str) -> str:
    near = get_close_matches(given, BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = f"{', '.join(BUILT_IN)}, a file, or a template itself{hint}"
    path = Path(given)
    try:
        if len(given) > _LONGEST or not path.is_file():
            raise LorakitError(f"the template {given!r:.200} is neither a name that is known nor a file; give {known}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, LorakitError):
            raise
        raise LorakitError(f"cannot read the template {given!r:.200}: {error}") from None
    if "{" not in text:
        raise LorakitError(f"the template in {given} has no place for anything: give one with {{prompt}}, or in Jinja")
    return text


def _check_plain(text: str) -> None:
    found = _PLACE.findall(text)
    for name in found:
        near = get_close_matches(name, _PLACES, n=1)
        if name not in _PLACES and near:
            raise LorakitError(f"the template has a place {{{name}}}; did you mean {{{near[0]}}}?")
    if not {"prompt", "instruction"}.intersection(found):
        raise LorakitError(
            f"the template {text!r:.200} has no place for the prompt: write {{prompt}} or {{instruction}}"
        )
    answers = [i for i, name in enumerate(found) if name in ("completion", "output")]
    if len(answers) > 1 or (
        answers and any(name in ("prompt", "instruction", "input") for name in found[answers[0] :])
    ):
        raise LorakitError("the template may name the completion once, after all else: what follows is trained on")


def filled(text: str, prompt: str, instruction: str, more: str) -> tuple[str, str]:
    """A plain template with a row's values: what comes before the completion, and what after.

    Paragraphs (parted by an empty line) that name an input are left out where a row has none.

    Raises:
        LorakitError: the row has an input, and the template no place for it.
    """
    names = _PLACE.findall(text)
    if more and "input" not in names and "prompt" not in names:
        raise LorakitError("the template has no place for the input that rows have: write {input}")
    if not more:
        text = "\n\n".join(part for part in text.split("\n\n") if "{input}" not in part)
    head, tail = text, ""
    for name in ("completion", "output"):
        if f"{{{name}}}" in text:
            head, tail = text.split(f"{{{name}}}", 1)
    values = {"prompt": prompt, "instruction": instruction, "input": more}
    # In one pass: a value that holds "{input}" itself is text.
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), head), tail
