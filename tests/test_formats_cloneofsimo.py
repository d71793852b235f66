"""cloneofsimo's adapters: numbered layers, found again in the order of the model."""

import os
from pathlib import Path

import pytest
import torch
from helpers import refused
from image_files import lora, rand, write_file
from torch import nn

import lorakit as lk
from lorakit.exchange import read, renamed_for

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
DISNEY = SHARED / "adapters" / "cloneofsimo-lora" / "lora_disney.safetensors"


class GEGLU(nn.Module):
    """Of the old diffusers: a class that is searched."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 8)


class Attention(nn.Module):
    """One of the classes, with another in it."""

    def __init__(self):
        super().__init__()
        self.to_q, self.inner, self.conv = nn.Linear(4, 5), GEGLU(), nn.Conv2d(3, 4, 1)


class BasicTransformerBlock(nn.Module):
    """Its parts in today's order."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn1, self.attn2, self.ff = nn.LayerNorm(4), Attention(), Attention(), GEGLU()


THEN = ["attn1.to_q", "attn1.inner.proj", "attn1.inner.proj", "ff.proj"]
THEN += ["attn2.to_q", "attn2.inner.proj", "attn2.inner.proj"]
NOW = [*THEN[:3], *THEN[4:], THEN[3]]


def numbered(model, order, convolutions=False):
    """Keys by number, the same factors for one layer each time; and the ΔW."""
    tensors, deltas = {}, {}
    for i, name in enumerate(order):
        W = model.get_submodule(name).weight
        parts, deltas[f"{name}.weight"] = lora(W, alpha=None)
        tensors[f"unet:{i}:up"], tensors[f"unet:{i}:down"] = parts["lora_up.weight"], parts["lora_down.weight"]
    return tensors, deltas


@pytest.mark.parametrize("order", [NOW, THEN])
def test_numbers_are_layers_in_the_order_of_then_or_of_now(tmp_path, order):
    model = BasicTransformerBlock()
    tensors, deltas = numbered(model, order)
    tensors["<s1>"] = rand(4)
    facts = {"unet": ["Attention", "GEGLU"], "<s1>": "<embed>"}
    path = write_file(tmp_path / "a.safetensors", tensors, **facts)
    value = read(path)
    assert value.format == "cloneofsimo" and value.left_out == ("<s1>",)
    named = renamed_for(value, model)
    assert {w.name: True for w in named.weights} == dict.fromkeys(deltas, True)
    for weight in named.weights:
        assert torch.equal(weight.tensors["B"] @ weight.tensors["A"], deltas[weight.name])
    with pytest.warns(UserWarning, match="<s1>"):
        lk.load(model, path)


def test_numbers_that_do_not_fit(tmp_path):
    model = BasicTransformerBlock()
    tensors, _ = numbered(model, NOW)
    facts = {"unet": ["Attention", "GEGLU"]}
    for change, words in (
        ({"unet:0:up": rand(9, 2)}, ("(9, 4)", "'attn1.to_q' (5, 4)")),
        ({"unet:7:up": rand(9, 2), "unet:7:down": rand(2, 4)}, ("beyond the layers",)),
        ({"unet:2:up": rand(8, 2, seed=5)}, ("'unet:1' and 'unet:2'", "not the same")),
        ({"unet:8:up": rand(9, 2), "unet:8:down": rand(2, 4)}, ("8 numbers",)),
        ({"unet:0:up": rand(5, 3)}, ("different ranks",)),
        ({"other": rand(5, 3)}, ("'other'", "no part")),
    ):
        path = write_file(tmp_path / "a.safetensors", {**tensors, **change}, **facts)
        with refused(model, *words):
            lk.load(model, path)
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith("unet:6")}
    with refused(model, "ends before 'ff.proj'"):
        lk.load(model, write_file(tmp_path / "a.safetensors", fewer, **facts))
    with pytest.raises(lk.LorakitError, match="no list of classes"):
        read(write_file(tmp_path / "a.safetensors", tensors, unet="{"))
    path = write_file(tmp_path / "a.safetensors", tensors, **facts)
    with pytest.raises(lk.LorakitError, match="give the model itself"):
        renamed_for(read(path), ["attn1.to_q"])


def test_a_list_of_tensors(tmp_path):
    model = BasicTransformerBlock()
    tensors, deltas = numbered(model, NOW)
    torch.save([tensors[f"unet:{i}:{end}"] for i in range(7) for end in ("up", "down")], tmp_path / "a.pt")
    named = renamed_for(read(tmp_path / "a.pt"), model)
    for weight in named.weights:
        assert torch.equal(weight.tensors["B"] @ weight.tensors["A"], deltas[weight.name])
    torch.save([torch.ones(2, 2), "x"], tmp_path / "b.pt")
    with pytest.raises(lk.LorakitError, match="not tensors by name"):
        read(tmp_path / "b.pt")
    torch.save([torch.ones(2, 2)], tmp_path / "c.pt")
    with pytest.raises(lk.LorakitError, match="lacks the factor A"):
        read(tmp_path / "c.pt")


@pytest.mark.skipif(not DISNEY.is_file(), reason=f"no {DISNEY}")
def test_the_real_numbered_file():
    value = read(DISNEY)
    assert len(value.weights) == 192 and value.left_out == ("<s1>", "<s2>")
    assert value.facts["cloneofsimo"]["text_encoder"] == ["CLIPAttention"]
    assert all(weight.variant == lk.LoRA(rank=1) for weight in value.weights)
