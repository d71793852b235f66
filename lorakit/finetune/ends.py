"""The ends of a text that a run taught, in the file that plain transformers reads them from."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.errors import LorakitError
from lorakit.finetune.resolve import kind_of, resolve
from lorakit.storage import read_json_object

GENERATION = "generation_config.json"


class Ends(NamedTuple):
    """The tokens that end a text."""

    file: bytes | None
    """The content of `generation_config.json` with them; None if it is right as it is."""
    said: str | None
    """What is to be said of it."""


def taught_ends(base: Path, adapter: str | Path) -> Ends:
    """The ends of a base after a run: its own, and those that the rows of the run ended with.

    A model that was trained to end with a chat template's <|im_end|>, or with another token than the end of text that
    was never trained, goes on for ever where only its config says when to stop.

    Args:
        base: its directory.
        adapter: a run directory, a checkpoint or an adapter; only a run says what it taught.
    """
    if not (base / "config.json").is_file():
        return Ends(None, None)
    try:
        run = resolve(adapter)
        if not run.settings:
            return Ends(None, None)
        if find_spec("transformers") is None:
            raise LorakitError("transformers is not installed")
        from lorakit.finetune.base import open_outline
        from lorakit.finetune.data import stops_of

        outline = open_outline(base)
        taught = stops_of(kind_of(run) or "text", outline.tokenizer, run.settings.get("template"))
        path = base / GENERATION
        told = read_json_object(path) if path.is_file() else _derived(outline.model.generation_config)
    except LorakitError as error:
        return Ends(None, f"the tokens that end a text are the base's; those of the run cannot be told: {error}")
    stated: Any = outline.model.generation_config.eos_token_id
    ends = list(stated) if isinstance(stated, list | tuple) else [] if stated is None else [stated]
    new = [token for token in taught if token not in ends]
    if not new:
        return Ends(None, None)
    told["eos_token_id"] = [*ends, *new]
    names = ", ".join(repr(outline.tokenizer.convert_ids_to_tokens(token)) for token in new)
    said = f"{GENERATION}: texts end with {names} too, as the run taught"
    return Ends((json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode(), said)


def _derived(known: Any) -> dict[str, Any]:
    """What transformers takes from the model's config where there is no such file."""
    found = {name: getattr(known, name, None) for name in ("bos_token_id", "pad_token_id")}
    return {name: value for name, value in found.items() if value is not None}
