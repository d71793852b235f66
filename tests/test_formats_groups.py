"""Grouped convolutions: the factors' shapes do not tell, the entry does, and no format takes one for another."""

import pytest
import torch
from helpers import attached
from torch import nn

import lorakit as lk


def grouped():
    torch.manual_seed(0)
    return nn.ModuleDict({"unet": nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))})


def test_the_entry_says_the_groups_and_the_native_form_keeps_them(tmp_path):
    model = attached(grouped(), targets=["unet.0"])
    value = lk.adapter_value(model)
    assert value.weights[0].entry.groups == 2
    lk.save(model, tmp_path / "a")
    assert lk.read(tmp_path / "a").weights[0].entry.groups == 2
    lk.load(fresh := grouped(), tmp_path / "a")
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(fresh["unet"](x), model["unet"](x))


@pytest.mark.parametrize("form", ["peft", "kohya", "diffusers", "loralib", "comfyui"])
def test_no_other_format_takes_it(form, tmp_path):
    value = lk.adapter_value(attached(grouped(), targets=["unet.0"]))
    known = {} if form in ("peft", "loralib") else {"part": "unet"}
    with pytest.raises(lk.LorakitError, match="groups"):
        lk.write(value, tmp_path / ("a.bin" if form == "loralib" else "a"), form, **known)
