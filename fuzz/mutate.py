"""Damage that gets past the first bytes: names, shapes, dtypes, values and JSON are changed, and the file made anew."""

import io
import json
import random
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz.readers import pack, unpack

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**40), 0.0, -0.0, 0.5, 1e300, 1e-300),
    *(
        float("nan"),
        float("inf"),
        "",
        "2",
        "lora",
        "weight",
        "../../x",
        "/dev/zero",
        "a\nb",
        "\x1b[31m",
        "\0",
        "é\u202e",
    ),
    *([], {}, [[]], [None], {"": None}, ["unet.0"], {"unet.0": 1}, [1, 2], "x" * 3000, [0] * 300, "(a+)+", "LORA"),
)
WORDS = ("unet.0", "unet.1", "words", "experts", "experts.up", "weight", "bias", "lora_A", "lora_B", "alpha", "", "0")


def mutate(data: bytes, random_: random.Random) -> bytes:
    """The input with one or several things in one of its files changed, mostly so that it is still such a file."""
    files = unpack(data)
    if not files:
        return data
    name = random_.choice(list(files))
    change = next((each for ending, each in CHANGES.items() if name.endswith(ending)), _bytes)
    if random_.random() < 0.08:
        change = _bytes
    with suppress(Exception):  # what cannot be taken apart any more is changed byte by byte
        files[name] = change(files[name], random_)
        return pack(files)
    files[name] = _bytes(files[name], random_)
    return pack(files)


def value(old: Any, r: random.Random) -> Any:
    """Something else in the place of a JSON value: deep in it, mostly, else of another type or out of any range."""
    if isinstance(old, str) and old[:1] in ("{", "[") and r.random() < 0.9:
        with suppress(ValueError):
            return json.dumps(value(json.loads(old), r))
    if isinstance(old, dict) and old and r.random() < 0.9:
        return _object(old, r)
    if isinstance(old, list) and old and r.random() < 0.9:
        return _list(old, r)
    if type(old) in (int, float) and r.random() < 0.4:
        return r.choice([old + 1, old - 1, old * 2, -old, str(old), [old], float(old)])
    if isinstance(old, str) and r.random() < 0.3:
        return _name(old, list(WORDS), r)
    return r.choice(ODD)


def _object(old: dict[str, Any], r: random.Random) -> dict[str, Any]:
    key, new, what = r.choice(list(old)), dict(old), r.random()
    if what < 0.1:
        del new[key]
    elif what < 0.2:
        new[r.choice([*WORDS, *map(str, new)])] = r.choice([new[key], *ODD])
    elif what < 0.25:
        new[_name(key, list(new), r)] = new.pop(key)
    else:
        new[key] = value(new[key], r)
    return new


def _list(old: list[Any], r: random.Random) -> list[Any]:
    at, new, what = r.randrange(len(old)), list(old), r.random()
    if what < 0.15:
        del new[at]
    elif what < 0.3:
        new.insert(at, r.choice([new[at], *ODD]))
    else:
        new[at] = value(new[at], r)
    return new


def _name(name: str, others: list[str], r: random.Random) -> str:
    at = r.randrange(len(name) + 1)
    return r.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + "." + name[at:],
            name + r.choice(WORDS),
            r.choice(WORDS) + "." + name,
            r.choice(others or [name]),
            r.choice([odd for odd in ODD if isinstance(odd, str)]),
            name * 2,
            name.replace("A", "B"),
            name.replace("0", "1"),
            name.replace("unet", "te"),
            name.replace("lora", "hada"),
        ]
    )


_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)


def _tensor(old: Tensor, r: random.Random) -> Tensor:
    changes: list[Callable[[], Tensor]] = [
        lambda: old.to(r.choice(_DTYPES)),
        lambda: old.reshape(-1),
        lambda: old[None],
        lambda: old.t().contiguous(),
        lambda: old[:-1],
        lambda: torch.cat([old, old]),
        lambda: old[..., :1],
        lambda: torch.zeros(()),
        lambda: torch.ones(()),
        lambda: torch.zeros(0, *old.shape[1:]),
        lambda: old * r.choice([0.0, float("nan"), float("inf"), 1e30, 1e-30, -1.0]),
        lambda: torch.ones([r.choice([0, 1, 2, 3, 8]) for _ in range(r.randrange(6))]),
    ]
    with suppress(Exception):
        return r.choice(changes)()
    return torch.zeros(2, 2)


def _tensors(old: dict[str, Tensor], r: random.Random) -> dict[str, Tensor]:
    new = dict(old)
    key = r.choice(list(new))
    what = r.random()
    if what < 0.15:
        del new[key]
    elif what < 0.35:
        new[_name(key, list(new), r)] = new.pop(key)
    elif what < 0.5:
        new[_name(key, list(new), r)] = new[key].clone()
    elif what < 0.6:
        other = r.choice(list(new))
        new[key], new[other] = new[other], new[key]
    else:
        new[key] = _tensor(new[key], r)
    return new


def _safetensors(content: bytes, r: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    what = r.random()
    if what < 0.45:
        metadata = header.get("__metadata__", {"format": "pt"})
        named = "lorakit" if "lorakit" in metadata and r.random() < 0.9 else r.choice(list(metadata) or ["format"])
        metadata = {**metadata, named: value(metadata.get(named, "pt"), r)}
        if not isinstance(metadata[named], str) and r.random() < 0.9:
            metadata[named] = str(metadata[named])
        header = {**header, "__metadata__": metadata}
    elif what < 0.85:
        from safetensors.torch import load, save

        metadata = header.get("__metadata__")
        return bytes(save({k: t.contiguous().clone() for k, t in _tensors(load(content), r).items()}, metadata))
    elif what < 0.95:
        header = value(header, r)
    else:
        body = body[: r.randrange(len(body) + 1)] + bytes(r.randrange(3))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _torch(content: bytes, r: random.Random) -> bytes:
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    if isinstance(loaded, list):
        loaded[r.randrange(len(loaded))] = _tensor(r.choice(loaded), r)
    else:
        loaded = _tensors(loaded, r)
        key = r.choice(list(loaded))
        what = r.random()
        if what < 0.05:
            loaded[key] = r.choice([*ODD, {"a": loaded[key]}, torch.Size([1]), loaded[key].to_sparse()])
        elif what < 0.1:
            loaded[key] = loaded[key].reshape(-1)[:1].expand(10 ** r.randrange(8), 2)
        elif what < 0.15:
            loaded = {r.choice(["model", "state_dict"]): loaded}
        elif what < 0.2:
            loaded[r.choice([0, None, ("a",), b"x"])] = loaded.pop(key)
        elif what < 0.25:
            flat = loaded[key].reshape(-1)
            with suppress(RuntimeError):
                loaded[key] = flat.as_strided((2, 2), (r.randrange(4), r.randrange(4)), r.randrange(4))
    stream = io.BytesIO()
    torch.save(loaded, stream, _use_new_zipfile_serialization=r.random() < 0.8)
    return stream.getvalue()


def _npz(content: bytes, r: random.Random) -> bytes:
    import numpy as np

    with np.load(io.BytesIO(content)) as loaded:
        tensors = {name: torch.from_numpy(array) for name, array in loaded.items()}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in _tensors(tensors, r).items()}
    name = r.choice(list(arrays))
    if r.random() < 0.3:
        arrays[name] = r.choice(
            [
                np.array(["a"]),
                np.asfortranarray(arrays[name]),
                arrays[name].astype(">f4"),
                np.ones(2, "c8"),
                np.ones(3, "O"),
            ]
        )
    stream = io.BytesIO()
    r.choice([np.savez, np.savez_compressed])(stream, **arrays)  # type: ignore[operator]
    return stream.getvalue()


def _gguf(content: bytes, r: random.Random) -> bytes:
    from lorakit.formats.gguf_file import gguf_bytes, read_gguf

    if r.random() < 0.5:  # numbers of the header
        at = r.randrange(min(len(content), 600))
        return (
            content[:at]
            + r.choice([b"\xff" * 8, bytes(8), b"\2", b"\xff", struct.pack("<Q", 2**40)])
            + content[at + 8 :]
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.gguf").write_bytes(content)
        tensors, metadata = read_gguf(Path(folder) / "a.gguf")
    values = {key: json.loads(text) for key, text in metadata.items()}
    if r.random() < 0.3:
        values = value(values, r)
    else:
        tensors = _tensors(tensors, r)
    return gguf_bytes(values, tensors)


def _json(content: bytes, r: random.Random) -> bytes:
    return json.dumps(value(json.loads(content), r)).encode()


def _yaml(content: bytes, r: random.Random) -> bytes:
    lines = content.decode().splitlines() or [""]
    at = r.randrange(len(lines))
    key = lines[at].partition(":")[0]
    odd = [repr(odd) for odd in ODD] + [
        "&a [*a]",
        "!!python/object:os.system x",
        "2026-01-01",
        "[*b]",
        "|",
        "~",
        ".nan",
    ]
    lines[at] = r.choice(
        [f"{key}: {r.choice(odd)}", "", f"{_name(key, [key], r)}: 1", f"? {key}", f"{lines[at]}\n{lines[at]}"]
    )
    return "\n".join(lines).encode()


def _bytes(content: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(content) + 1)
    few = bytes(r.randrange(256) for _ in range(r.randrange(1, 9)))
    return r.choice(
        [
            content[:at],
            content[:at] + few + content[at + len(few) :],
            content[:at] + few + content[at:],
            content[:at] + content[at + len(few) :],
            content[at:],
            content + content,
            few,
        ]
    )


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".safetensors": _safetensors,
    ".json": _json,
    ".yaml": _yaml,
    ".npz": _npz,
    ".gguf": _gguf,
    ".bin": _torch,
    ".pt": _torch,
    ".lora": _torch,
}
