"""One rank and one scale for all: the same ΔW in a form that engines with a single scale read rightly."""

import copy
import json

import pytest
import torch
from helpers import attached
from peers import build, out
from torch import nn

import lorakit as lk
from lorakit.exchange import read, write
from lorakit.files import adapter_value
from lorakit.values.portable import portable

VARIED = {
    "lora": lk.LoRA(rank=2, alpha=5),
    "rslora": lk.LoRA(rank=3, alpha=4, scaling="rslora"),
    "pissa": lk.LoRA(rank=2, alpha=3, init="pissa"),
    "lora-fa": lk.LoRAFA(rank=2, alpha=3),
    "adalora": lk.AdaLoRA(rank=2, alpha=3),
}


def of_one_scale(adapter, engine: str):
    """Each weight's ΔW as an engine computes it: from one scale in the config, or from the rank of each tensor."""
    fields = adapter.variant.peft_fields()
    for weight in adapter.weights:
        A, B = weight.tensors["A"], weight.tensors["B"]
        inner = 2 if weight.stacked else 1
        alpha = fields["lora_alpha"]
        scale = alpha / (fields["r"] if engine == "vllm" else B.shape[inner])
        yield weight.name, scale * (B.flatten(inner) @ A.flatten(inner))


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2", "conv", "words"])
@pytest.mark.parametrize("name", VARIED)
def test_one_scale_gives_every_update(kind, name, engine):
    base, _, targets = build(kind)
    first = targets[0]
    more = {"ranks": {first: 4}, "alphas": {first: 3}} if name != "pissa" else {"alphas": {first: 4}}
    value = adapter_value(attached(base, VARIED[name], targets=targets, **more))
    made, notes = portable(value)
    assert made.variant == lk.LoRA(made.variant.rank, alpha=made.variant.rank)
    assert {weight.variant for weight in made.weights} == {made.variant}
    found = dict(of_one_scale(made, engine))
    for weight in value.weights:
        B, A = weight.product()
        wanted = B @ A
        assert (found[weight.name] - wanted).abs().max() <= 1e-7 * max(1.0, wanted.abs().max().item())
    assert any("--max-lora-rank" in note for note in notes)


@pytest.mark.parametrize("format", ["lorakit", "peft"])
def test_a_portable_file_acts_as_the_adapter_did(format, tmp_path):
    base, x, targets = build("llama")
    model = attached(copy.deepcopy(base), VARIED["rslora"], targets=targets, ranks={"q_proj": 5}, alphas={"v_proj": 1})
    notes = write(adapter_value(model), tmp_path / "a", format, portable=True)
    assert any("--max-lora-rank 8 for rank 5" in note for note in notes)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    lk.load(base, tmp_path / "a")
    assert (out(base, x) - out(model, x)).abs().max() < 1e-6


def test_sixteen_bits_are_not_rounded_again():
    base, _, targets = build("mlp")
    value = adapter_value(attached(base, lk.LoRA(rank=3, alpha=1), targets=targets))
    half = value.with_weights(
        weight._replace(tensors={name: tensor.bfloat16() for name, tensor in weight.tensors.items()})
        for weight in value.weights
    )
    for weight, made in zip(half.weights, portable(half)[0].weights, strict=True):
        assert torch.equal(made.tensors["B"], weight.tensors["B"].float() * (1 / 3))


REFUSED = {
    "whole": ({"train_also": "2.bias"}, lk.LoRA(rank=1), ["'2.bias'", "as a whole"]),
    "rows": ({"train_rows": {"1": [1]}}, lk.LoRA(rank=1), ["'1.weight'", "rows"]),
    "dora": ({}, lk.DoRA(rank=1), ["'0.weight'", "DoRA"]),
    "loha": ({}, lk.LoHa(rank=1), ["'0.weight'", "LoHa"]),
    "lokr": ({}, lk.LoKr(rank=1), ["'0.weight'", "LoKr"]),
    "vera": ({}, lk.VeRA(rank=1), ["'0.weight'", "VeRA"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_engines_would_leave_out_is_an_error(case, tmp_path):
    how, variant, words = REFUSED[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    value = adapter_value(attached(model, variant, targets="0", **how))
    with pytest.raises(lk.LorakitError) as caught:
        write(value, tmp_path / "a", portable=True)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "a").exists()


def test_a_rank_that_vllm_has_not_is_said():
    model = nn.Sequential(nn.Linear(600, 600))
    assert any("no rank above 512" in note for note in portable(adapter_value(attached(model, lk.LoRA(513))))[1])


def test_a_value_read_from_peft_is_made_portable(tmp_path):
    base, _, targets = build("llama")
    lk.save(attached(base, VARIED["rslora"], targets=targets), tmp_path / "a")
    write(read(tmp_path / "a"), tmp_path / "b", "peft")
    value = read(tmp_path / "b")
    assert value.format == "peft"
    for before, after in zip(value.weights, portable(value)[0].weights, strict=True):
        (B, A), (b, a) = before.product(), after.product()
        assert (B @ A - b @ a).abs().max() <= 1e-7 * max(1.0, (B @ A).abs().max().item())
