"""A checkpoint written anew with some tensors changed: shard by shard, tensor by tensor, all of it or nothing."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lorakit.checkpoints.checkpoint import Checkpoint, Part, give_back, raw
from lorakit.checkpoints.shards import Shard, head_of
from lorakit.checkpoints.staged import staged
from lorakit.errors import LorakitError

Progress = Callable[[int, int, str], None]
"""Called with the bytes that are done, the bytes of all, and the name of the tensor that is next."""

Change = Callable[[str, Tensor], Tensor]
"""Name and value → the value to write, in the same shape and dtype. It may write into the value."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ckpt", ".index.json")


def rewrite(
    base: Checkpoint,
    out: str | os.PathLike[str],
    changed: Mapping[str, Change],
    *,
    force: bool = False,
    progress: Progress | None = None,
    accept: Callable[[], None] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> tuple[str, ...]:
    """Write the base with these tensors changed: the same names, shapes, dtypes, order, shards and metadata.

    No more than one tensor is in memory. What is changed must be a plain copy of what is there before: tensors of torch
    files, mappings and modules are written as safetensors.

    Args:
        base: what is written.
        out: a file ending in .safetensors if the base is one file, else a directory, where the base's other files go
            too; it appears whole or not at all.
        changed: what to do with tensors, by their names.
        force: whether what is there may be replaced.
        progress: called as it goes on.
        accept: called when all is written and nothing has appeared; if it raises, nothing does.
        files: other files by their names, in the place of the base's; a base of one file has none.

    Returns:
        What is in the base's directory and was not copied: other files of weights, directories, hidden files.

    Raises:
        LorakitError: `out` exists, or cannot be written, or is a file where a directory is needed.
    """
    out = Path(os.path.abspath(out))
    if out.suffix == ".safetensors" and (len(base.parts) > 1 or base.folder is not None):
        raise LorakitError(f"{base.where} is a directory, and {out} the name of a file: name a directory")
    own = base.folder or next((stored.file for stored in base.tensors.values() if stored.file is not None), None)
    if own is not None and out.resolve() in own.resolve().parents:
        raise LorakitError(f"{out} holds {base.where}, which it would take the place of: name another place")
    left_out: list[str] = []
    done = 0
    with staged(out, force=force) as beside:
        single = out.suffix == ".safetensors"
        target = beside if single else beside / out.name
        target.mkdir(exist_ok=True)
        if base.folder is not None:
            left_out = _copy_others(base, base.folder, target)
            for name, content in (files or {}).items():
                (target / name).write_bytes(content)
        for part in base.parts:
            shard = part.shard or head_of(((name, base[name]) for name in part.names), {"format": "pt"})
            with (target / (out.name if single else part.name)).open("wb") as file:
                done = _write(base, part, shard, file, changed, progress, done)
                file.flush()
                os.fsync(file.fileno())
        if base.index is not None and any(part.shard is None for part in base.parts):
            _write_index(base, target)
        if progress is not None:
            progress(done, base.bytes, "")
        if accept is not None:
            accept()
    return tuple(left_out)


def _write(
    base: Checkpoint,
    part: Part,
    shard: Shard,
    file: BinaryIO,
    changed: Mapping[str, Change],
    progress: Progress | None,
    done: int,
) -> int:
    file.write(shard.head)
    for name in part.names:
        if progress is not None:
            progress(done, base.bytes, name)
        stored = base[name]
        if name in changed:
            value = base.read(name)
            result = changed[name](name, value)
            if result.dtype != stored.dtype or tuple(result.shape) != stored.shape:
                raise LorakitError(f"{name!r} became {tuple(result.shape)}, {result.dtype}: an error of lorakit's own")
            file.write(raw(result.contiguous()))
            del value, result
            give_back()
        else:
            for piece in base.pieces(name):
                file.write(piece)
        done += stored.bytes
    return done


def _copy_others(base: Checkpoint, folder: Path, target: Path) -> list[str]:
    """Copy what is no weights: config, tokenizer and the like. Other files of weights would be of the old ones."""
    left_out = []
    mine = base.index if all(part.shard is not None for part in base.parts) else None
    written = {part.source for part in base.parts} | {base.index}
    for entry in sorted(folder.iterdir()):
        if entry.name == mine:
            shutil.copyfile(entry, target / entry.name)
        elif entry.name in written:
            continue
        elif entry.name.endswith(WEIGHTS) or entry.name.startswith(".") or not entry.is_file():
            left_out.append(entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)
    return left_out


def _write_index(base: Checkpoint, target: Path) -> None:
    index: dict[str, Any] = {
        "metadata": {"total_size": base.bytes},
        "weight_map": {name: part.name for part in base.parts for name in part.names},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
