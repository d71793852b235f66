"""Reading examples from a file (JSONL, JSON, CSV, Parquet) or a data set of the hub; all that is wrong is said at once.

Nothing here loads the packages for data sets unless the source is one: files of text are read by what Python has.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.finetune.data.columns import FORMS, recognised
from lorakit.finetune.data.contents import BadRowError, maker_of
from lorakit.finetune.data.rows import Row, Rows
from lorakit.finetune.data.text_files import PACKED, TEXT_FORMS, Record, read_text_file
from lorakit.finetune.pause import uncollected
from lorakit.mistaken import check_fetched

SUFFIXES = (*TEXT_FORMS, ".parquet")


def read_rows(
    source: str | os.PathLike[str],
    *,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Rows:
    """The examples in a file or a data set, checked; their kind is told by their columns.

    Looked for are, in this order: `messages` (a list of {role, content}) or `conversations` (ShareGPT's from and
    value); `prompt` and `completion` (text, or lists of messages); `instruction`, perhaps `input` (or `context`), and
    `output` (or `response`); `question` and `answer`, which are read as instruction and output; `text`. All rows of a
    source are of one kind.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet; the first four also packed as .gz, .bz2 or .xz), a
            directory of such files or one that `datasets` saved, or a data set of the hub ("owner/name" or
            "owner/name:config").
        form: "messages", "prompt", "instruction" or "text", where columns would allow several.
        columns: names by role, where a file has others: {"prompt": "question", "completion": "query"}.
        split: of a data set; "train" if none is given.

    Raises:
        LorakitError: it cannot be read; its columns are none that are known; or it has bad rows, all of which are
            named with file, line and reason.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise LorakitError(f"data is named by a file or a data set of the hub, not by {source!r:.60}")
    name = os.fspath(source)
    if form not in FORMS:
        near = get_close_matches(str(form), FORMS, n=1)
        raise LorakitError(f"form {form!r} is none of {', '.join(FORMS)}" + (f"; {near[0]}?" if near else ""))
    if not name.strip():
        raise LorakitError("no data is named: give a file such as train.jsonl, or a data set of the hub")
    with uncollected():
        records, bad = _records(name, split)
        return _rows(name, records, bad, form, columns or {})


def _records(name: str, split: str | None) -> tuple[list[Record], list[str]]:
    """What a source holds, and what of it cannot be read."""
    path = Path(name)
    try:
        there, directory = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise LorakitError(f"cannot read {name!r:.200}: {error}") from None
    if directory and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        from lorakit.finetune.data.stored import read_saved

        return read_saved(path, split), []
    if there:
        if split is not None:
            raise LorakitError(f"{name} is no data set of the hub, and has no split {split!r}: leave split away")
        files = _files_in(path) if directory else [path]
        found = [_read_file(file) for file in files]
        return list(chain.from_iterable(f[0] for f in found)), list(chain.from_iterable(f[1] for f in found))
    if form_of(path) is not None or not _is_hub_id(name):
        raise LorakitError(_missing(path, name))
    from lorakit.finetune.data.stored import read_hub

    return read_hub(name, split), []


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and owner[0] not in ".~" and "\\" not in name


def form_of(path: Path) -> str | None:
    """The ending that says what a file holds, without that of its packing; None if it says nothing."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _missing(path: Path, name: str) -> str:
    hint = ""
    try:
        near = get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    except OSError:
        hint = f"; nor is there a directory {path.parent}"
    return f"there is no file {name}{hint}"


def _files_in(path: Path) -> list[Path]:
    try:
        found = sorted(each for each in path.iterdir() if form_of(each) and each.is_file() and each.name[0] != ".")
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {error.strerror or error}") from None
    if not found:
        raise LorakitError(f"{path} holds no file of examples: expected are {', '.join(SUFFIXES)}")
    return found


def _read_file(path: Path) -> tuple[list[Record], list[str]]:
    form = form_of(path)
    if form is None:
        raise LorakitError(f"{path} is no file of examples by its name: expected are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise LorakitError(f"{path} is no file that can be read twice, such as a pipe: write it to a file first")
    packed = path.name.lower().endswith(PACKED)
    if not packed:
        check_fetched(path)
    if form == ".parquet":
        if packed:
            raise LorakitError(f"{path}: Parquet is not read from a packed file; unpack it first")
        from lorakit.finetune.data.stored import read_parquet

        return read_parquet(path), []
    return read_text_file(path, form)


def _rows(source: str, records: list[Record], bad: list[str], form: str, given: Mapping[str, str]) -> Rows:
    """Rows of the records, or an error that names all that cannot be one."""
    items: list[Row] = []
    if not records and not bad:
        raise LorakitError(f"{source} holds no rows: there is nothing to train on")
    if records:
        usual, found = _columns_of(records)
        layout = recognised(source, usual, found, form, given)
        make = maker_of(layout)
        for where, record in records:
            try:
                kind, content = make(record)
            except BadRowError as error:
                bad.append(f"{where}: {error}")
            else:
                items.append(Row(where, kind, content))
        if not bad:
            kinds = Counter(row.kind for row in items)
            usual_kind = kinds.most_common(1)[0][0]
            if len(kinds) > 1:  # prompts as text here and as messages there
                odd = (row for row in items if row.kind != usual_kind)
                bad += [f"{row.where}: is of the kind {row.kind}, others are of {usual_kind}" for row in odd]
    if bad:
        raise LorakitError(refusal(source, bad))
    used = layout.columns
    ignored = tuple(str(name) for name in found if name not in used.values())
    return Rows(source, items[0].kind, used, ignored, items)


def _columns_of(records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """The columns that at least half of the records have, and all of them, in the order in which they appear."""
    shapes = Counter(tuple(record) for _, record in records)
    counts: Counter[str] = Counter()
    for shape, count in shapes.items():
        for name in shape:
            counts[name] += count
    half = sum(shapes.values()) / 2
    return [name for name, count in counts.items() if count >= half], list(counts)


def refusal(source: str, bad: list[str]) -> str:
    """The message that names bad rows, in the order of their lines."""
    bad = sorted(bad, key=lambda line: re.sub(r"\d+", lambda digits: digits[0].zfill(12), line.partition(": ")[0]))
    what = "1 row" if len(bad) == 1 else f"{len(bad):,} rows"
    return "\n".join([f"{source}: {what} cannot be used; mend or remove:", *(f"  {line}" for line in bad)])
