"""What lies in the place of a file when it was not fetched: a pointer, a web page, a message, nothing at all."""

import re
from pathlib import Path

from lorakit.errors import LorakitError

_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\s.*?size (\d{1,18})\s*$", re.DOTALL)
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!": "rar", b"\xfd7zX": "xz"}
_OLD_LLAMA = (b"algg", b"ggla")
_LOOK = 512


def check_fetched(path: Path) -> None:
    """Whether a file that was to hold tensors, or a config, is another thing by its first bytes.

    Raises:
        LorakitError: it is; the error says which, and what to do.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_LOOK)
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {error.strerror or error}") from None
    found = _found(start)
    if found is not None:
        raise LorakitError(f"{path} {found}")


def _found(start: bytes) -> str | None:
    pointer = _POINTER.match(start)
    if pointer is not None:
        return (
            f"is a pointer of git-lfs, not the file of {int(pointer[1]):,} bytes that it stands for: fetch that with "
            "'git lfs pull', or download it"
        )
    if not start:
        return "is empty: save or fetch it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not the file itself: the download was answered with an error or a log-in; fetch it again"
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packed is not None:
        return f"is packed with {packed}: unpack it first"
    if start.startswith(_OLD_LLAMA):
        return (
            "is llama.cpp's adapter format of before GGUF (ggla), which is not read: convert what it was made from, a "
            "directory of PEFT"
        )
    return None


def as_text(path: Path) -> str | None:
    """The first line of a file that holds but a message: JSON, or a few words; None if it is not text."""
    with path.open("rb") as file:
        start = file.read(_LOOK)
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError:
        return None
    line = text.strip().partition("\n")[0].strip()
    return line[:80] if line and line.isprintable() else None
