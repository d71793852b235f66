"""LitGPT's adapters: fused projections in two layouts, of which some parts are adapted."""

import warnings

import pytest
import torch
from helpers import assert_bits, assert_close
from llamas import ALPHA, GROUPS, HEADS, SIZE, WIDE, WIDTH, R, llama, logits, trained, with_deltas
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import read_content

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def fused_delta(A: Tensor, B: Tensor, enabled, heads, groups, size, layout) -> Tensor:
    """(rows of the fused weight, k), by LitGPT's own steps: a product for each part, then rows put in their places."""
    counts = [heads, groups, groups]
    shapes = [count * size for count, on in zip(counts, enabled, strict=True) if on]
    chunks = zip(A.chunk(len(shapes)), B.split(shapes), strict=True)
    x = torch.cat([F.conv1d(a[None], b.unsqueeze(-1))[0] for a, b in chunks])
    if all(enabled):
        return x
    total = (heads + 2 * groups) * size
    if layout == "attn":  # by groups of queries, a key and a value
        group = heads // groups + 2
        kinds = [min((row // size) % group - (group - 3), 2) for row in range(total)]
        kinds = [max(kind, 0) for kind in kinds]
    else:
        kinds = [0] * heads * size + [1] * groups * size + [2] * groups * size
    places = [row for part in range(3) if enabled[part] for row, kind in enumerate(kinds) if kind == part]
    return x.new_zeros(total, A.shape[1]).index_copy(0, torch.tensor(places), x)


def unfused(delta: Tensor, heads, groups, size, layout) -> list[Tensor]:
    """Rows of q, k and v, as LitGPT's converter to transformers takes them apart."""
    if layout == "qkv":
        return list(delta.split([heads * size, groups * size, groups * size]))
    split = [chunk.split([heads // groups * size, size, size]) for chunk in delta.chunk(groups)]
    return [torch.cat([each[part] for each in split]) for part in range(3)]


def lit_tensors(enabled, heads=HEADS, groups=GROUPS, layout="qkv", others=True) -> dict[str, Tensor]:
    torch.manual_seed(4)
    rows = sum(count * SIZE for count, on in zip((heads, groups, groups), enabled, strict=True) if on)
    shapes = {"attn.proj": (WIDTH, heads * SIZE), "mlp.fc_1": (WIDE, WIDTH), "mlp.fc_2": (WIDE, WIDTH)}
    shapes["mlp.proj"] = (WIDTH, WIDE)
    found = {}
    for i in range(2):
        if any(enabled):
            found[f"transformer.h.{i}.attn.{layout}.lora_A"] = torch.randn(R * sum(enabled), WIDTH) * 0.3
            found[f"transformer.h.{i}.attn.{layout}.lora_B"] = torch.randn(rows, R) * 0.3
        for name, (d, k) in shapes.items() if others else ():
            found[f"transformer.h.{i}.{name}.lora_A"] = torch.randn(R, k) * 0.3
            found[f"transformer.h.{i}.{name}.lora_B"] = torch.randn(d, R) * 0.3
    return found


def lit_files(folder, tensors, enabled, model_config=True, config=True):
    folder.mkdir()
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    if config:
        q, k, v = (str(on).lower() for on in enabled)
        text = f"lora_r: {R}\nlora_alpha: {ALPHA}\nlora_dropout: 0.0\nlora_query: {q}\nlora_key: {k}\nlora_value: {v}\n"
        (folder / "hyperparameters.yaml").write_text(text)
    if model_config:
        text = f"name: x\nn_head: {HEADS}\nn_query_groups: {GROUPS}\nhead_size: {SIZE}\n"
        (folder / "model_config.yaml").write_text(text)
    return folder


ENABLED = [(True, False, True), (True, True, True), (False, True, False), (True, True, False), (False, False, True)]


@pytest.mark.parametrize("layout", ["qkv", "attn"])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
@pytest.mark.parametrize("model_config", [True, False])
def test_litgpt_loads_to_what_it_computes(enabled, layout, model_config, tmp_path):
    tensors, model, deltas = lit_tensors(enabled, layout=layout), llama(), {}
    for i in range(2):
        A, B = (tensors[f"transformer.h.{i}.attn.{layout}.lora_{letter}"] for letter in "AB")
        delta = fused_delta(A, B, enabled, HEADS, GROUPS, SIZE, layout) * ALPHA / R
        for name, part in zip("qkv", unfused(delta, HEADS, GROUPS, SIZE, layout), strict=True):
            deltas[f"model.layers.{i}.self_attn.{name}_proj"] = part
        for own, hf in {
            "attn.proj": "self_attn.o_proj",
            "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }.items():
            A, B = (tensors[f"transformer.h.{i}.{own}.lora_{letter}"] for letter in "AB")
            deltas[f"model.layers.{i}.{hf}"] = ALPHA / R * B @ A
    wanted = with_deltas(model, deltas)
    lk.load(model, lit_files(tmp_path / "a", tensors, enabled, model_config))
    assert_close(logits(model), wanted, factor=10)


@pytest.mark.parametrize("layout", ["qkv", "attn"])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_litgpt_on_a_model_with_its_names(enabled, layout, tmp_path):
    tensors = lit_tensors(enabled, layout=layout, others=False)
    rows = (HEADS + 2 * GROUPS) * SIZE
    blocks = [nn.ModuleDict({"attn": nn.ModuleDict({layout: nn.Linear(WIDTH, rows)})}) for _ in range(2)]
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList(blocks)})})
    path = lit_files(tmp_path / "a", tensors, enabled)
    lk.load(model, path)
    fused, x = blocks[1]["attn"][layout], torch.randn(3, WIDTH)
    A, B = (tensors[f"transformer.h.1.attn.{layout}.lora_{letter}"] for letter in "AB")
    delta = fused_delta(A, B, enabled, HEADS, GROUPS, SIZE, layout) * ALPHA / R
    assert_close(fused(x), F.linear(x, fused.weight + delta, fused.bias), factor=10)


@pytest.mark.parametrize("layout", ["qkv", "attn"])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_litgpt_is_written_as_it_was_read(enabled, layout, tmp_path):
    tensors = lit_tensors(enabled, layout=layout)
    path = lit_files(tmp_path / "a", tensors, enabled)
    write(read(path), tmp_path / "b", "litgpt")
    assert_bits(dict(read_content(tmp_path / "b").tensors), tensors)
    config = read_content(tmp_path / "b").config
    assert [config[f"lora_{name}"] for name in ("query", "key", "value")] == list(enabled)
    assert config["lora_r"] == R and config["lora_alpha"] == ALPHA and config["lora_mlp"] is True
    if layout == "qkv":  # through transformers' names, in the native form and back
        write(renamed_for(read(path), llama()), tmp_path / "native")
        write(read(tmp_path / "native"), tmp_path / "c", "litgpt")
        assert_bits(dict(sorted(read_content(tmp_path / "c").tensors.items())), dict(sorted(tensors.items())))


def test_litgpt_fills_up_what_it_adapts_together(tmp_path):
    model = trained(
        llama(), targets=[r"layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.up_proj"]
    )
    write(adapter_value(model), tmp_path / "a", "litgpt")
    tensors = read_content(tmp_path / "a").tensors
    assert tensors["transformer.h.0.attn.qkv.lora_B"].shape == ((HEADS + GROUPS) * SIZE, R)
    assert {key for key in tensors if ".mlp." in key and key.endswith("A")} == {
        f"transformer.h.1.mlp.{name}.lora_A" for name in ("fc_1", "fc_2", "proj")
    }
    again = llama()
    lk.load(again, tmp_path / "a")
    assert_close(logits(again), logits(model), factor=10)


def test_litgpt_asks_for_what_it_needs(tmp_path):
    enabled = (True, False, True)
    path = lit_files(tmp_path / "a", lit_tensors(enabled), enabled, model_config=False)
    assert read(path).missing == ("heads",)
    assert not read(path, heads=HEADS, kv_heads=GROUPS).missing
    with pytest.raises(lk.LorakitError, match="36 rows are none of 5 heads"):
        read(path, heads=5)
    bare = lit_files(tmp_path / "b", lit_tensors(enabled), enabled, model_config=False, config=False)
    assert read(bare).missing == ("alpha", "enabled", "heads")
    assert read(bare, alpha=ALPHA, enabled=enabled, heads=HEADS, kv_heads=GROUPS).weights[0].variant.scale == ALPHA / R
    other = lit_files(tmp_path / "c", lit_tensors(enabled), enabled)
    with pytest.raises(lk.LorakitError, match="heads=4, and it is 2"):
        read(other, heads=2)
    with pytest.raises(lk.LorakitError, match="leave alpha= away"):
        read(other, alpha=3)
