"""Files of text: JSONL, JSON, CSV and TSV, read to records with the line each begins at, and what cannot be read.

Whatever is wrong with one line is said of that line; the others are read on, so that all is said at once.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.errors import LorakitError

Record = tuple[str, dict[str, Any]]
"""Where a record stands, and its values by column."""
Bad = list[str]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = tuple(_OPENERS)
TEXT_FORMS = (".jsonl", ".json", ".csv", ".tsv")
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text_file(path: Path, form: str) -> tuple[list[Record], Bad]:
    """The records of a file, and what is wrong with those that cannot be read, each with its line.

    Args:
        path: the file.
        form: one of `TEXT_FORMS`.

    Raises:
        LorakitError: the file as a whole cannot be read.
    """
    opened = next((opener for ending, opener in _OPENERS.items() if path.name.lower().endswith(ending)), open)
    bad: Bad = []
    try:
        with cast(BinaryIO, opened(path, "rb")) as file:
            lines = _lines(path, file)
            if form == ".jsonl":
                records = list(_json_lines(path.name, lines, bad))
            elif form == ".json":
                records = _json(path, b"".join(lines), bad)
            else:
                records = _table(path, lines, bad, "\t" if form == ".tsv" else None)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise LorakitError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return records, bad


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without a mark of UTF-8 at the first."""
    for number, line in enumerate(file):
        if number == 0:
            other = next((name for mark, name in _OTHER_BOMS.items() if line.startswith(mark)), None)
            if other is not None:
                raise LorakitError(f"{path} is text in {other}: save it as UTF-8")
            line = line.removeprefix(_BOM)
        yield line


def _no_utf8(error: UnicodeDecodeError) -> str:
    return f"is no UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"


# JSON


_NO_OBJECT = "is no object with columns as its keys"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key is there twice: which of the two was meant?"""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _why(error: Exception) -> str:
    """What is wrong with a text that is no JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON: {error.msg} at character {error.pos + 1}"
    return "is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_lines(name: str, lines: Iterable[bytes], bad: Bad) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().strip()
            if not text:
                continue
            value = _DECODER.decode(text)
        except UnicodeDecodeError as error:
            bad.append(f"{name}:{number}: {_no_utf8(error)}")
        except (ValueError, RecursionError) as error:
            bad.append(f"{name}:{number}: {_why(error)}")
        else:
            if type(value) is dict:
                yield f"{name}:{number}", value
            else:
                bad.append(f"{name}:{number}: {_NO_OBJECT}")


_LISTS = ("messages", "conversations", "prompt", "completion", "tools")
"""Columns of a row that may be a list of objects: an object that holds one is a row, not a list of rows."""
_SPACE = re.compile(r"[ \t\r\n]*")


def _json(path: Path, data: bytes, bad: Bad) -> list[Record]:
    """A list of objects; an object that holds one such list; or, as many files are named, JSONL.

    Raises:
        LorakitError: it is none of these.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LorakitError(f"{path}:{line} {_no_utf8(error)}: save the file as UTF-8") from None
    start = _end_of_space(text, 0)
    if text.startswith("[", start):
        return list(_json_list(path, text, start + 1, bad))
    try:
        value = _DECODER.decode(text) if start < len(text) else None
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return list(_json_lines(path.name, data.split(b"\n"), bad))
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LorakitError(f"{path}{place} {_why(error)}") from None
    if start == len(text):
        return []
    if type(value) is not dict:
        raise LorakitError(f"{path} is no list of objects: it is one value alone")
    lists = [key for key, each in value.items() if type(each) is list and each and type(each[0]) is dict]
    if len(lists) != 1 or lists[0] in _LISTS:
        return [(f"{path.name}:1", value)]  # a file of one row
    found: list[Record] = []
    for number, item in enumerate(value[lists[0]]):
        where = f"{path.name}: {lists[0]}[{number}]"
        if type(item) is dict:
            found.append((where, item))
        else:
            bad.append(f"{where}: {_NO_OBJECT}")
    return found


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _json_list(path: Path, text: str, at: int, bad: Bad) -> Iterator[Record]:
    """The objects in a list, each with its line."""
    line, counted, more = 1, 0, False
    while True:
        at = _end_of_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at) and not more:
            break
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            bad.append(f"{path.name}:{error.lineno}: is no JSON: {error.msg}; what follows was not read")
            return
        except (ValueError, RecursionError) as error:
            bad.append(f"{path.name}:{line}: {_why(error)}; what follows was not read")
            return
        if type(value) is dict:
            yield f"{path.name}:{line}", value
        else:
            bad.append(f"{path.name}:{line}: {_NO_OBJECT}")
        at = _end_of_space(text, at)
        more = text.startswith(",", at)
        at += more
        if not more and not text.startswith("]", at):
            bad.append(f"{path.name}:{1 + text.count(chr(10), 0, at)}: is no JSON: a comma or ] is missing")
            return
    if text[at + 1 :].strip():
        bad.append(f"{path.name}:{line}: is no JSON: something follows the end of the list")


# Tables


def _table(path: Path, lines: Iterable[bytes], bad: Bad, separator: str | None) -> list[Record]:
    """The records of a CSV, whose first line names the columns.

    Raises:
        LorakitError: it names one twice, or none.
    """
    wrong: set[int] = set()

    def decoded() -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                wrong.add(number)
                bad.append(f"{path.name}:{number}: {_no_utf8(error)}")
                text = line.decode(errors="replace")
            yield text

    texts = decoded()
    start: list[str] = []  # up to the line of names
    for line in texts:
        start.append(line)
        if line.strip():
            break
    first = start[-1] if start else ""
    if separator is None:
        separator = ";" if "," not in first and ";" in first else ","
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the whole process
    try:
        return _parsed(path, csv.reader(chain(start, texts), delimiter=separator, strict=True), bad, wrong)
    finally:
        csv.field_size_limit(limit)


def _parsed(path: Path, reader: Any, bad: Bad, wrong: set[int]) -> list[Record]:
    header: list[str] | None = None
    found: list[Record] = []
    while True:
        line = reader.line_num + 1  # a quoted field may hold line ends: a record is where it begins
        try:
            fields = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:
            bad.append(f"{path.name}:{line}: is no CSV: {error}")
            continue
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = {name for name in header if name and header.count(name) > 1}
            if twice:
                raise LorakitError(f"{path} has the column {min(twice)!r} twice in its first line")
        elif len(fields) != len(header):
            s = "s" * (len(fields) != 1)
            bad.append(f"{path.name}:{line}: has {len(fields)} field{s}; the first line names {len(header)} columns")
        elif not wrong.intersection(range(line, reader.line_num + 1)):
            found.append((f"{path.name}:{line}", dict(zip(header, fields, strict=True))))
