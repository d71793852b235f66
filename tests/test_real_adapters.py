"""Adapters that others trained: what is in them, and what they do on a model of their shapes."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import refused
from peers import peft, transformers
from torch import nn

import lorakit as lk

ADAPTERS = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "adapters"
pytestmark = pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the shared adapters are not at hand")


def skeleton(adapter: lk.Adapter) -> nn.Module:
    """A model that has just the linear layers that an adapter changes, under their names."""
    torch.manual_seed(0)
    root = nn.Module()
    for weight in adapter.weights:
        module = root
        *parents, own = weight.entry.path.split(".")
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        if own not in module._modules:
            shapes = {w.entry.parameter: w for w in adapter.weights if w.entry.path == weight.entry.path}
            main = shapes.get("weight", weight)
            if "A" in main.tensors:
                sizes = main.tensors["A"].shape[1], main.tensors["B"].shape[0]
            else:
                sizes = tuple(main.tensors["value"].shape[::-1])
            module.add_module(own, nn.Linear(*sizes))
    return root.eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers so
def test_gpt_neo_computes_as_in_peft():
    """24 layers of 768 with q and v: the outputs of PEFT on the same base."""
    config = transformers.GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, vocab_size=64, attention_types=[[["global", "local"], 6]]
    )
    torch.manual_seed(0)
    base = transformers.GPTNeoForCausalLM(config).eval()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(ADAPTERS / "peft-gptneo125m-qv")).eval()
    tokens = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = base(tokens).logits
        lk.load(base, ADAPTERS / "peft-gptneo125m-qv")
        wanted, got = theirs(tokens).logits, base(tokens).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and (got - before).abs().max() > 0.01
    assert lk.adapters(base)["peft-gptneo125m-qv"].parameters == 294_912


def test_a_token_classifier_loads_with_its_head():
    adapter = lk.read(ADAPTERS / "peft-privacyfilter-tokencls")
    model = skeleton(adapter)
    lk.load(model, ADAPTERS / "peft-privacyfilter-tokencls", name="filter")
    score = next(weight for weight in adapter.weights if weight.name == "score.weight")
    x = torch.randn(3, 640)
    bias = next(weight for weight in adapter.weights if weight.name == "score.bias")
    wanted = x @ score.tensors["value"].T + bias.tensors["value"]
    assert torch.allclose(model.score(x), wanted, atol=1e-5)
    q = model.get_submodule("model.layers.3.self_attn.q_proj")
    B, A = next(w for w in adapter.weights if w.name == "model.layers.3.self_attn.q_proj.weight").product()
    assert torch.allclose(q(x), x @ (q._parameters["weight"] + B @ A).T + q.bias, atol=1e-4)


def test_the_papers_roberta_adapter_needs_its_alpha():
    file = ADAPTERS / "loralib-roberta-base-mnli" / "roberta_base_lora_mnli.bin"
    adapter = lk.read(file)
    assert adapter.missing == ("alpha",)
    model = skeleton(adapter)
    with refused(model, "alpha"):
        lk.load(model, file)
    lk.load(model, file, name="mnli", alpha=16)
    query = model.get_submodule("roberta.encoder.layer.0.attention.self.query")
    A, B = (
        torch.load(file, "cpu", weights_only=True)[f"roberta.encoder.layer.0.attention.self.query.lora_{f}"]
        for f in "AB"
    )
    x = torch.randn(2, 768)
    assert torch.allclose(query(x), x @ (query._parameters["weight"] + 2 * B @ A).T + query.bias, atol=1e-4)


def test_the_mlx_adapter_is_looked_at_and_loads_with_a_scale():
    adapter = lk.read(ADAPTERS / "mlx-npz-potterbot" / "adapters.npz")
    found = lk.inspect(adapter)
    assert adapter.format == "mlx" and adapter.missing and not found.broken
    assert {weight.rank for weight in found.weights} == {4}


@pytest.mark.parametrize("rank", [2, 4, 6, 8, 16])
def test_a_home_made_format_is_refused_for_what_it_is(rank):
    with pytest.raises(lk.LorakitError, match="no adapter format") as caught:
        lk.read(ADAPTERS / "sam-lora-qv-ranks" / f"lora_rank{rank}.safetensors")
    assert "w_a_000" in str(caught.value)


def test_real_updates_have_far_fewer_directions_than_their_rank():
    """What the README says of resizing: 8 ranks of which half hold 99.9% of the energy."""
    adapter = lk.read(ADAPTERS / "peft-gptneo125m-qv")
    small, report = lk.resize(adapter, rank=4)
    assert report.error < 0.05
    exact = math.hypot(*lk.norm(adapter - small).values()) / math.hypot(*lk.norm(adapter).values())
    assert report.error == pytest.approx(exact, rel=1e-4)
    assert lk.compare(adapter, small).same is False
