"""Parquet files, data sets that `datasets` has saved, and data sets of the hub: loaded only where one is named."""

import logging
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.finetune.data.text_files import Record


def read_parquet(path: Path) -> list[Record]:
    """The records of a Parquet file.

    Raises:
        LorakitError: pyarrow is missing, or cannot read it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LorakitError(f"reading {path} needs pyarrow: pip install 'lorakit[llm]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LorakitError(f"cannot read {path} as Parquet: {_line(error)}") from None
    return [(f"{path.name}: row {number}", record) for number, record in enumerate(records, 1)]


def read_saved(path: Path, split: str | None) -> list[Record]:
    """The records of a directory that `Dataset.save_to_disk` has written, or of one split of a `DatasetDict`.

    Raises:
        LorakitError: it cannot be read, or has no such split.
    """
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise LorakitError(f"cannot read {path} as a saved data set: {_line(error)}") from None
    if isinstance(found, dict):
        found = _of_split(str(path), found, split)
    elif split is not None:
        raise LorakitError(f"{path} is saved without splits: leave split away")
    return _records(path.name, found)


def read_hub(name: str, split: str | None) -> list[Record]:
    """The records of a split of a data set of the hub, "owner/name" or "owner/name:config".

    Raises:
        LorakitError: there is no such data set or split, or no network.
    """
    datasets = _datasets(name)
    where, _, config = name.partition(":")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of each time it tries again; one error says it all
    try:
        found = datasets.load_dataset(where, config or None)
    except Exception as error:  # of many packages: the hub's, the network's, those of file formats
        what = (
            "the hub cannot be reached" if isinstance(error, ConnectionError) else "as a data set of the hub it fails"
        )
        raise LorakitError(f"there is no file or directory {name}, and {what}: {_line(error)}") from None
    finally:
        logger.setLevel(level)
    return _records(name, _of_split(name, found, split))


def _of_split(name: str, found: Any, split: str | None) -> Any:
    wanted = "train" if split is None and "train" in found else split
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    if wanted not in found:
        raise LorakitError(f"{name} has no split {wanted or 'train'!r}; it has {', '.join(found)}: name one as split")
    return found[wanted]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise LorakitError(f"reading the data set {name} needs datasets: pip install 'lorakit[llm]'") from None
    return datasets


def _records(name: str, found: Any) -> list[Record]:
    table = found.with_format("arrow")[:]
    return [(f"{name}: row {number}", record) for number, record in enumerate(table.to_pylist(), 1)]


def _line(error: BaseException) -> str:
    """The first line of another package's message."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
