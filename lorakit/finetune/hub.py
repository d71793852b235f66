"""Where a model lies: in a directory, or under a hub id, in the cache or on the hub."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorakit.errors import LorakitError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*"]
"""The files of a model, but for weights in torch's own format, which many repositories hold beside the others."""


def is_local(where: str) -> bool:
    """Whether it is a directory with a model; what can be neither that nor a hub id is an error.

    Raises:
        LorakitError: it is a file, a directory without a model, or no hub id.
    """
    path = Path(where)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise LorakitError(f"{where} is no model of transformers: it holds no config.json{_instead(path)}")
        return True
    if path.exists():
        raise LorakitError(f"{where} is a file: a model is a directory with config.json, weights and tokenizer")
    if not _HUB_ID.fullmatch(where) or where.endswith((".json", ".safetensors", ".yaml", ".yml")):
        raise LorakitError(f"there is no directory {where}, and that is no hub id (owner/name) either")
    return False


def _instead(path: Path) -> str:
    """What a directory without a model is, if it can be told."""
    try:
        if (path / "adapter_config.json").exists():
            told = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
            return f"; it is an adapter{f' of {base}' if base else ''}"
    except (OSError, ValueError):
        return "; it is an adapter"
    if (path / "config.yaml").exists():
        return "; it is a training run, whose base is in its config.yaml"
    return ""


def hub_is_near() -> bool:
    """Whether the hub's name can be looked up: without a network transformers would try for half a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except (OSError, UnicodeError):
        return False
    return True


@contextmanager
def offline(on: bool = True) -> Iterator[None]:
    """Inside, huggingface_hub sends nothing, as under `HF_HUB_OFFLINE=1`, which it reads once, when it is imported.

    `local_files_only` does not reach everything: transformers looks for an adapter beside a model without it.
    """
    from huggingface_hub import constants

    its: Any = constants
    before = its.HF_HUB_OFFLINE
    its.HF_HUB_OFFLINE = before or on
    try:
        yield
    finally:
        its.HF_HUB_OFFLINE = before


def snapshot(where: str, revision: str | None = None) -> Path:
    """The directory of a hub id's files: from the cache, where the hub cannot be reached, else brought there.

    Raises:
        LorakitError: it is no hub id, there is no such model, or it is not in the cache and the hub is not near.
    """
    is_local(where)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LorakitError(f"there is no directory {where}, and for a hub id: pip install 'lorakit[llm]'") from None
    near = hub_is_near()
    how: dict[str, Any] = {"revision": revision, "local_files_only": not near, "ignore_patterns": ["*/*"]}
    try:
        with offline(not near):
            folder = Path(snapshot_download(where, allow_patterns=_WANTED, **how))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(where, allow_patterns=[*_WANTED, "*.bin"], **how))
    except Exception as error:  # of requests, of the hub and of the system
        why = " ".join((str(error).strip() or type(error).__name__).split("\n\n")[0].split())[:300]
        why = f" ({why})" if near else "; the hub cannot be reached from here, nor is it in the cache"
        raise LorakitError(f"there is no directory {where}, and as a hub id it cannot be loaded{why}") from None
    return folder
