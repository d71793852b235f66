"""Merging into a checkpoint is merging into the live model, to the bit; what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from helpers import attached
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit import LorakitError
from lorakit.checkpoints.checkpoint import listed, shortened
from lorakit.checkpoints.merging import merge_checkpoint

VARIANTS = [
    lk.LoRA(rank=3, alpha=5),
    lk.LoRA(rank=2, dropout=0.1, init="pissa"),
    lk.DoRA(rank=2),
    lk.LoHa(rank=2),
    lk.LoKr(rank=2),
    lk.VeRA(rank=8),
    lk.AdaLoRA(rank=3),
]


def llama(dtype: torch.dtype = torch.float32, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **more,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def saved(model: nn.Module, path: Path, shards: str = "30KB") -> Path:
    model.save_pretrained(path, max_shard_size=shards)
    (path / "tokenizer.json").write_text("{}")
    return path


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def heads(folder: Path) -> dict[str, bytes]:
    """The header of each file: names, shapes, dtypes, places and metadata."""
    contents = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    return {name: content[: 8 + int.from_bytes(content[:8], "little")] for name, content in contents.items()}


def same_bits(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: type(variant).__name__)
def test_it_is_merging_into_the_live_model_to_the_bit(make, variant, dtype, tmp_path):
    base = saved(make(dtype), tmp_path / "base")
    targets = "all-linear" if make is llama else ["c_attn", "c_proj", "c_fc"]  # its head is tied to the embedding
    model = attached(make(dtype), variant, targets=targets)
    merge_checkpoint(base, lk.adapter_value(model), tmp_path / "out", least_survival=0, scale=0.5)
    lk.merge(model, {"default": 0.5})
    same_bits(values(tmp_path / "out"), model.state_dict())
    assert heads(tmp_path / "out") == heads(base)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    same_bits(again.state_dict(), again.state_dict() | values(tmp_path / "out"))


@pytest.mark.parametrize("block", [2**22, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_weights_and_rows_and_an_embedding(dtype, block, tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.checkpoints.merging._BLOCK", block)
    base = saved(llama(dtype), tmp_path / "base")
    model = llama(dtype)
    how = {
        "targets": ["q_proj", "lm_head"],
        "train_also": ["norm", "layers.0.mlp.up_proj"],
        "train_rows": {"embed_tokens": [3, 9]},
    }
    attached(model, lk.LoRA(rank=2), **how)
    report = merge_checkpoint(base, lk.adapter_value(model), tmp_path / "out", least_survival=0)
    lk.merge(model)
    same_bits(values(tmp_path / "out"), model.state_dict())
    assert "model.norm.weight" in [weight.name for weight in report.weights]


def adapter_for(model: nn.Module, variant: object = None, **how: object) -> lk.Adapter:
    return lk.adapter_value(attached(model, variant or lk.LoRA(rank=2), **how))


def refused(base: object, adapter: lk.Adapter, path: Path, *words: str, **how: object) -> None:
    """Nothing appears, and the error has these words."""
    before = sorted(path.iterdir())
    with pytest.raises(LorakitError) as caught:
        merge_checkpoint(base, adapter, path / "out", **how)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(path.iterdir()) == before


def renamed(adapter: lk.Adapter, change: object) -> lk.Adapter:
    return adapter.with_weights(w._replace(entry=w.entry._replace(path=change(w.entry.path))) for w in adapter.weights)


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = adapter_for(model)
    gone = {name: tensor for name, tensor in base.items() if "v_proj" not in name}
    refused(gone, adapter, tmp_path, "lacks 2 of its 15", "layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj")
    wrong = dict(base)
    wrong["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    wrong["model.layers.1.self_attn.q_proj.weight"] = wrong["model.layers.1.self_attn.q_proj.weight"] + 1
    wrong["model.layers.1.mlp.up_proj.weight"] = wrong["model.layers.1.mlp.up_proj.weight"].bfloat16()
    wrong["model.layers.1.mlp.gate_proj.weight"] = wrong["model.layers.1.mlp.gate_proj.weight"].to(torch.int8)
    refused(wrong, adapter, tmp_path, "(3, 3)", "other values", "bfloat16", "verify='off'", "int8")
    first, *rest = adapter.weights
    second, *others = rest
    nan = first._replace(tensors=first.tensors | {"A": first.tensors["A"] * float("nan")})
    short = second._replace(tensors=second.tensors | {"B": second.tensors["B"][:3]})
    refused(base, adapter.with_weights([nan, short, *others]), tmp_path, "NaN", first.name, "B (3, 2)", second.name)
    refused(base, adapter.with_weights([first, first, *rest]), tmp_path, "twice")
    huge = dict(first.tensors) | {"A": first.tensors["A"] * 1e30, "B": first.tensors["B"] * 1e30}
    refused(base, adapter.with_weights([first._replace(tensors=huge), *rest]), tmp_path, "NaN or infinity", first.name)
    for how in ({"scale": float("nan")}, {"least_survival": 2}, {"verify": "no"}):
        refused(base, adapter, tmp_path, next(iter(how)), **how)
    refused(tmp_path / "nowhere", adapter, tmp_path, "does not exist")


def test_quantized_weights_are_refused_by_name(tmp_path):
    model = llama()
    base, adapter = model.state_dict(), adapter_for(llama())
    name = "model.layers.0.mlp.up_proj.weight"
    for packed in (
        f"{name}.absmax",
        f"{name}.quant_state.bitsandbytes__nf4",
        "model.layers.0.mlp.up_proj.weight_scale",
    ):
        refused({**base, packed: torch.ones(3)}, adapter, tmp_path, name, packed, "quantized")
    awq = {key: value for key, value in base.items() if key != name}
    refused({**awq, "model.layers.0.mlp.up_proj.qweight": torch.ones(3)}, adapter, tmp_path, name, "quantized")


def test_a_prefix_is_added_or_dropped_and_said(tmp_path):
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = adapter_for(model, targets=["q_proj", "up_proj"])
    wanted = llama()
    lk.load(wanted, adapter)
    lk.merge(wanted)
    for i, (change, prefix) in enumerate(
        [(lambda path: path.removeprefix("model."), "+model."), (lambda path: f"base.{path}", "-base.")]
    ):
        report = merge_checkpoint(base, renamed(adapter, change), tmp_path / str(i))
        assert report.prefix == prefix and prefix[1:] in str(report)
        same_bits(values(tmp_path / str(i)), wanted.state_dict())
    two = {**base, **{f"other.{name}": tensor for name, tensor in base.items()}}
    refused(two, renamed(adapter, lambda path: path.removeprefix("model.")), tmp_path, "several ways", "+other.model.")
    refused(base, renamed(adapter, lambda path: path.replace("q_proj", "q")), tmp_path, "lacks 2 of its 4")


def test_ties_are_said_or_refused(tmp_path):
    model = gpt2()
    base = saved(model, tmp_path / "base")
    refused(base, adapter_for(gpt2(), targets=["wte"]), tmp_path, "wte", "output head", "live model")
    refused(base, adapter_for(gpt2(), targets=["lm_head"]), tmp_path, "lm_head", "ties it to the embedding")
    merge_checkpoint(base, adapter_for(gpt2(), targets=["wpe"]), tmp_path / "positions")
    save_model(gpt2(), str(tmp_path / "one.safetensors"))
    one = tmp_path / "one.safetensors"
    refused(one, adapter_for(gpt2(), targets=["wte"]), tmp_path, "stored once")
    report = merge_checkpoint(model, adapter_for(gpt2(), targets=["wte"]), tmp_path / "live.safetensors")
    assert report.untied == ("lm_head.weight",) and "lm_head" in str(report)
    live = load_file(tmp_path / "live.safetensors")
    assert torch.equal(live["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(live["transformer.wte.weight"], model.lm_head.weight)


def test_an_update_that_rounding_would_take_is_refused_unless_told(tmp_path):
    model = attached(llama(torch.bfloat16), lk.LoRA(rank=2))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter.mul_(0.008)
    adapter, base = lk.adapter_value(model), llama(torch.bfloat16)
    refused(base, adapter, tmp_path, "rounding would take more than 50%", "q_proj", "least_survival")
    report = merge_checkpoint(base, adapter, tmp_path / "out", least_survival=0)
    with pytest.warns(UserWarning, match="rounding lost more"):
        live = lk.merge(model)
    assert {w.name: w.lost for w in report.weights} == pytest.approx({w.name: w.lost for w in live.weights})
    assert {w.name: w.change for w in report.weights} == pytest.approx({w.name: w.change for w in live.weights})
    assert 0.5 < report.lost <= 2 and "lost" in str(report)
    assert merge_checkpoint(llama(), adapter, tmp_path / "wide", verify="off").lost == 0


@pytest.mark.parametrize("kind", ["conv", "stack", "embedding"])
@pytest.mark.parametrize("variant", [lk.LoRA(rank=2), lk.DoRA(rank=2), lk.LoHa(rank=2), lk.LoKr(rank=2)])
def test_other_kinds_of_layers(kind, variant, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        if kind == "conv":
            return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2))
        if kind == "embedding":
            return nn.Sequential(nn.Embedding(9, 6), nn.Embedding(9, 6, padding_idx=2), nn.Linear(3, 3))
        model = nn.Module()
        model.experts = nn.Parameter(torch.randn(3, 6, 5))
        return model

    targets = {"conv": [nn.Conv1d, nn.Conv2d], "stack": ["experts"], "embedding": [nn.Embedding]}[kind]
    model = attached(make(), variant, targets=targets)
    merge_checkpoint(make(), lk.adapter_value(model), tmp_path / "x.safetensors")
    lk.merge(model)
    same_bits(load_file(tmp_path / "x.safetensors"), model.state_dict())


def test_a_file_of_peft_on_weights_that_are_in_out(tmp_path):
    """It does not say how weights are seen; of the square ones among GPT-2's only the biases of the others tell."""
    base = saved(gpt2(), tmp_path / "base")
    model = attached(gpt2(), lk.LoRA(rank=2), targets=["c_attn", "c_proj", "c_fc"])
    adapter = lk.adapter_value(model)
    bare = adapter.with_weights(w._replace(entry=w.entry._replace(kind=None, sample=None)) for w in adapter.weights)
    merge_checkpoint(base, bare, tmp_path / "out")
    lk.merge(model)
    same_bits(values(tmp_path / "out"), model.state_dict())


def test_the_report_says_it_of_all_together_and_of_the_worst(tmp_path):
    model = attached(llama(torch.bfloat16), lk.LoRA(rank=2))
    report = merge_checkpoint(llama(torch.bfloat16), lk.adapter_value(model), tmp_path / "out", least_survival=0)
    base = llama(torch.bfloat16).state_dict()
    names = [weight.name for weight in report.weights]
    updates = lk.norm(lk.adapter_value(model))
    norm = sum(float(base[name].double().norm()) ** 2 for name in names) ** 0.5
    assert report.change == pytest.approx(sum(updates[name] ** 2 for name in names) ** 0.5 / norm, rel=1e-2)
    assert len(report.weights) == 15
    lines = report.brief(3).splitlines()
    worst = sorted(report.weights, key=lambda weight: -weight.lost)[:3]
    assert lines[0].startswith("15 weights merged") and [line.split()[0] for line in lines[3:]] == [
        w.name for w in worst
    ]


def test_other_files_take_the_place_of_the_base_s(tmp_path):
    base = saved(llama(), tmp_path / "base")
    files = {"tokenizer.json": b"[1]", "new.txt": b"new"}
    merge_checkpoint(base, adapter_for(llama()), tmp_path / "out", files=files)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert (base / "tokenizer.json").read_text() == "{}" and not (base / "new.txt").exists()


@pytest.mark.parametrize("count", [1, 5, 6, 40, 41, 60])
def test_a_short_message_counts_all_that_it_leaves_out(count):
    text = listed("Title:", [f"problem {i}" for i in range(count)]) + "\nadvice"
    lines = shortened(text).splitlines()
    assert lines[0] == "Title:" and lines[-1] == "advice" and len(lines) == 2 + min(count, 6)
    assert count <= 5 or lines[-2] == f"  - and {count - 5} more"
    assert shortened("no list") == "no list"
