"""What a run leaves behind beside the adapter: its numbers, line by line, and where it ran."""

import json
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.storage import write_whole

_PACKAGES = (
    "lorakit", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "bitsandbytes", "deepspeed",
)  # fmt: skip


class Metrics:
    """`metrics.jsonl`: a line for each time that something was measured.

    A run that goes on from a checkpoint forgets what was measured after it, and a line that was cut off.
    """

    def __init__(self, path: Path, after: int | None) -> None:
        self.path = path
        self.rows = [] if after is None else [row for row in read_metrics(path) if row.get("step", 0) <= after]
        write_whole(path, b"".join(_encoded(row) for row in self.rows))

    def add(self, **row: Any) -> None:
        """Another line; what is no number is written as null, which every reader of JSON knows."""
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(_encoded(row))


def _encoded(row: dict[str, Any]) -> bytes:
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return (json.dumps(plain, ensure_ascii=False) + "\n").encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    rows = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """The versions and the hardware that a run used."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory(device: Any) -> int:
    """Bytes: the most that the GPU had to hold, or what the process holds now."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
