"""Small valid files of every format, for a fuzzer to begin with."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lorakit as lk
from fuzz.readers import CONFIGS, FILES, pack
from lorakit.formats import FORMATS, Known


def adapters() -> list[lk.Adapter]:
    """Adapters of every method, on layers of several kinds."""
    made = []
    for variant in (lk.LoRA(2, alpha=3), lk.DoRA(1), lk.LoHa(1), lk.LoKr(1), lk.VeRA(2), lk.AdaLoRA(2)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 3, 2)), "words": nn.Embedding(5, 4)})
        plain = type(variant) in (lk.LoRA, lk.DoRA)
        lk.attach(model, variant, ["unet.0", "unet.1", "words"] if plain else ["unet.0"])
        for parameter in lk.adapter_parameters(model):
            nn.init.normal_(parameter)
        made.append(lk.adapter_value(model))
    return made


def seeds() -> dict[str, bytes]:
    """Inputs by a name, each of which is read as an adapter; and some that are none."""
    found = {"empty": pack(FILES[0], b""), "text": pack(FILES[0], b"not a file of tensors")}
    for i, adapter in enumerate(adapters()):
        for form in FORMATS.values():
            if form.write is None:
                continue
            try:
                written = form.write(adapter, Known(part="unet", arch="llama", heads=2))
            except lk.LorakitError:
                continue
            found[f"{form.name}-{i}"] = _packed(written.files)
    return found


def _packed(files: "dict[str, bytes] | object") -> bytes:
    contents = dict(files)  # type: ignore[call-overload]
    config = next((contents.pop(name) for name in CONFIGS if name in contents), b"")
    ((name, content),) = contents.items()
    return pack(_name(name), content, config)


def _name(name: str) -> str:
    if name in FILES:
        return name
    suffix = Path(name).suffix
    return next((known for known in FILES if known.endswith(suffix)), FILES[0])


__all__ = ["adapters", "seeds", "tempfile"]
