"""Adapter files of every format that is known here, as values and back. One file for each format.

A file's format is found from its keys. What a format does not hold (alpha, say) is asked for, never guessed.
"""

from pathlib import Path

from lorakit.errors import LorakitError, UnknownFormatError
from lorakit.formats.cloneofsimo import CLONEOFSIMO
from lorakit.formats.content import Content, read_content
from lorakit.formats.diffusers import COMFYUI, DIFFUSERS, DIFFUSERS_OLD
from lorakit.formats.form import Format, Known, Written, check_needed
from lorakit.formats.gguf import GGUF
from lorakit.formats.kohya import KOHYA
from lorakit.formats.litgpt_write import LITGPT
from lorakit.formats.loralib import LORALIB
from lorakit.formats.mlx import MLX
from lorakit.formats.names import Names, of_part
from lorakit.formats.peft import LORAKIT, PEFT
from lorakit.formats.rope import with_heads
from lorakit.formats.torchtune import TORCHTUNE
from lorakit.formats.xlabs import XLABS
from lorakit.patterns import some
from lorakit.values.adapter import Adapter

_IMAGE = (KOHYA, DIFFUSERS, DIFFUSERS_OLD, COMFYUI, XLABS, CLONEOFSIMO)
_LANGUAGE = (LORALIB, MLX, LITGPT, TORCHTUNE, GGUF)
FORMATS: dict[str, Format] = {each.name: each for each in (LORAKIT, PEFT, *_IMAGE, *_LANGUAGE)}
"""Every format by its name."""


def format_of(content: Content) -> Format:
    """The format of a file, by its keys.

    Raises:
        UnknownFormatError: it is none that is known here.
        LorakitError: it may be one of several.
    """
    found = [each for each in FORMATS.values() if each.recognises(content)]
    if len(found) == 1:
        return found[0]
    keys = some(list(content.tensors))
    if found:
        raise LorakitError(f"{content.file} looks like {' and '.join(each.name for each in found)}: say format=...")
    raise UnknownFormatError(f"{content.file} is of no adapter format that is known here; its keys are {keys}")


def form_named(name: str) -> Format:
    """The format of this name.

    Raises:
        LorakitError: there is none.
    """
    if name not in FORMATS:
        raise LorakitError(f"format={name!r} is not known; it is one of {', '.join(FORMATS)}")
    return FORMATS[name]


def content_of(path: Path, format: str | None, known: Known) -> tuple[Content, Format]:
    """What lies in a file or directory, and its format.

    Raises:
        LorakitError: it is damaged, of no format that is known here, or something was given that it holds itself.
    """
    content = read_content(path, format_of if format is None else None)
    form = format_of(content) if format is None else form_named(format)
    check_needed(f"{content.path} is of {form.name}, which", known, form.takes)
    return content, form


def read_adapter(path: Path, format: str | None, known: Known) -> Adapter:
    """The adapter in a file or directory, with the names that it has there.

    Raises:
        UnknownFormatError: there is none of a format that is known here.
        LorakitError: it is damaged.
    """
    content, form = content_of(path, format, known)
    return form.read(content, known)


def resolved(adapter: Adapter, names: Names, known: Known) -> Adapter:
    """The adapter with the names that a model's layers have.

    Raises:
        LorakitError: names that fit no layer, or several: all of them in one error.
    """
    if adapter.naming == "parts":
        return of_part(adapter, names, known.part)
    how = FORMATS[adapter.format].resolve if adapter.format in FORMATS else {}
    if adapter.naming == "":  # names are a model's already; some formats leave to it what they do not say
        return how[""](adapter, names, known) if "" in how else adapter
    return how[adapter.naming](adapter, names, known)


__all__ = [
    "FORMATS",
    "Content",
    "Format",
    "Known",
    "Names",
    "Written",
    "check_needed",
    "content_of",
    "form_named",
    "format_of",
    "read_adapter",
    "read_content",
    "resolved",
    "with_heads",
]
