"""Adapters of torchtune, LitGPT and llama.cpp on Llama-like models: names, rows of rotations, fused projections."""

import copy
import json
import warnings

import gguf
import numpy as np
import pytest
import torch
from helpers import assert_bits, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import read_content
from lorakit.formats.rope import to_halves, to_pairs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HEADS, GROUPS, SIZE, WIDTH, WIDE = 4, 2, 6, 16, 20
IDS = torch.tensor([[1, 7, 2, 9, 30]])
R, ALPHA = 3, 5.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(cls=None, config=None, **more) -> nn.Module:
    torch.manual_seed(0)
    config = (config or transformers.LlamaConfig)(
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        vocab_size=31,
        initializer_range=0.5,
        **more,
    )
    return (cls or transformers.LlamaForCausalLM)(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def with_deltas(model: nn.Module, deltas: dict[str, Tensor]) -> Tensor:
    """The logits of a copy whose weights are W + ΔW."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        model.get_submodule(name).weight += delta
    return logits(model)


@torch.no_grad()
def trained(model: nn.Module, targets=TARGETS, method=None, **more) -> nn.Module:
    lk.attach(model, method or lk.LoRA(rank=R, alpha=ALPHA), targets, **more)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


# rotations


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_each_order_of_rows_is_the_inverse_of_the_other(heads, half, width, dtype):
    rows = torch.randn(heads * half * 2, width).to(dtype)
    assert torch.equal(to_halves(to_pairs(rows, heads), heads), rows)
    assert torch.equal(to_pairs(to_halves(rows, heads), heads), rows)


@pytest.mark.parametrize("heads", [0, 3, 4])
def test_rows_that_are_no_heads(heads):
    with pytest.raises(lk.LorakitError, match="heads of an even number"):
        to_halves(torch.ones(4, 2), heads)


def test_both_orders_give_the_same_scores():
    model = llama()
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, WIDTH)
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])  # (1, 5, SIZE), each angle twice
    q, k = ((x @ W.T).view(1, 5, -1, SIZE).transpose(1, 2) for W in (attention.q_proj.weight, attention.k_proj.weight))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wanted = q @ k.repeat_interleave(HEADS // GROUPS, 1).mT
    turn = torch.complex(cos, sin)[..., : SIZE // 2]  # neighbours are one complex number

    def in_pairs(weight: Tensor, heads: int) -> Tensor:
        rows = (x @ to_pairs(weight, heads).T).view(1, 5, heads, SIZE // 2, 2).contiguous()
        turned = torch.view_as_complex(rows) * turn.unsqueeze(2)
        return torch.view_as_real(turned).flatten(3).transpose(1, 2)

    q, k = in_pairs(attention.q_proj.weight, HEADS), in_pairs(attention.k_proj.weight, GROUPS)
    assert_close(q @ k.repeat_interleave(HEADS // GROUPS, 1).mT, wanted, factor=10)


# torchtune

TUNE = {
    "attn.q_proj": ("self_attn.q_proj", HEADS * SIZE, WIDTH),
    "attn.k_proj": ("self_attn.k_proj", GROUPS * SIZE, WIDTH),
    "attn.v_proj": ("self_attn.v_proj", GROUPS * SIZE, WIDTH),
    "attn.output_proj": ("self_attn.o_proj", WIDTH, HEADS * SIZE),
    "mlp.w1": ("mlp.gate_proj", WIDE, WIDTH),
    "mlp.w2": ("mlp.down_proj", WIDTH, WIDE),
    "mlp.w3": ("mlp.up_proj", WIDE, WIDTH),
}


def tune_tensors(dora: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(2)
    found = {}
    for i in range(2):
        for name, (_, d, k) in TUNE.items():
            found[f"layers.{i}.{name}.lora_a.weight"] = torch.randn(R, k) * 0.3
            found[f"layers.{i}.{name}.lora_b.weight"] = torch.randn(d, R) * 0.3
            if dora:
                found[f"layers.{i}.{name}.magnitude"] = torch.rand(d) + 0.5
    return found


def tune_files(folder, tensors, config=None):
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.pt")
    if config is not False:
        config = config or {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def to_hf(weight: Tensor, name: str) -> Tensor:
    """A weight of torchtune as transformers has it."""
    heads = {"attn.q_proj": HEADS, "attn.k_proj": GROUPS}.get(name)
    if heads is None:
        return weight
    return weight.view(heads, SIZE // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def from_hf(weight: Tensor, name: str) -> Tensor:
    heads = {"attn.q_proj": HEADS, "attn.k_proj": GROUPS}.get(name)
    return weight if heads is None else weight.view(heads, 2, SIZE // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune_loads_to_what_it_computes(dora, tmp_path):
    model, tensors, deltas = llama(), tune_tensors(dora), {}
    for i in range(2):
        for name, (hf, _, _) in TUNE.items():
            A, B = (tensors[f"layers.{i}.{name}.lora_{letter}.weight"] for letter in "ab")
            path = f"model.layers.{i}.{hf}"
            W = from_hf(model.get_submodule(path).weight.detach(), name)
            after = W + ALPHA / R * B @ A
            if dora:
                after = (tensors[f"layers.{i}.{name}.magnitude"] / after.norm(dim=1)).unsqueeze(1) * after
            deltas[path] = to_hf(after - W, name)
    wanted = with_deltas(model, deltas)
    lk.load(model, tune_files(tmp_path / "a", tensors))
    assert_close(logits(model), wanted, factor=10)


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune_is_written_as_it_was_read(dora, tmp_path):
    tensors = tune_tensors(dora)
    path = tune_files(tmp_path / "a", tensors)
    value = read(path)
    write(value, tmp_path / "b", "torchtune")
    assert_bits(dict(read_content(tmp_path / "b").tensors), tensors)
    model = llama()
    in_hf = renamed_for(value, model)
    write(in_hf, tmp_path / "native")
    write(read(tmp_path / "native"), tmp_path / "c", "torchtune", heads=HEADS, kv_heads=GROUPS)
    assert_bits(dict(sorted(read_content(tmp_path / "c").tensors.items())), dict(sorted(tensors.items())))
    lk.load(model, tmp_path / "c")
    assert_bits(dict(sorted(lk.adapter_state_dict(model).items())), dict(sorted(in_hf.state_dict().items())))


def test_torchtune_on_a_model_with_its_names(tmp_path):
    block = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(WIDTH, 24), "k_proj": nn.Linear(WIDTH, 12)})})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    tensors = {
        key: value for key, value in tune_tensors().items() if key.startswith(("layers.0.attn.q", "layers.0.attn.k"))
    }
    lk.load(model, tune_files(tmp_path / "a", tensors))
    state = lk.adapter_state_dict(model)
    assert torch.equal(
        state["base_model.model.layers.0.attn.q_proj.lora_B.weight"], tensors["layers.0.attn.q_proj.lora_b.weight"]
    )
    write(adapter_value(model), tmp_path / "b", "torchtune")
    assert_bits(dict(sorted(read_content(tmp_path / "b").tensors.items())), dict(sorted(tensors.items())))


def test_torchtune_leaves_the_rows_of_qwen(tmp_path):
    model = llama(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
    lk.load(model, tune_files(tmp_path / "a", tune_tensors()))
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    assert torch.equal(lk.adapter_state_dict(model)[key], tune_tensors()["layers.1.attn.k_proj.lora_b.weight"])
    write(adapter_value(model), tmp_path / "b", "torchtune", arch="qwen2")
    assert_bits(dict(sorted(read_content(tmp_path / "b").tensors.items())), dict(sorted(tune_tensors().items())))


def test_torchtune_asks_for_what_it_needs(tmp_path):
    path = tune_files(tmp_path / "a", tune_tensors(), config=False)
    assert read(path).missing == ("alpha",)
    assert not read(path, alpha=ALPHA).missing
    model = llama()
    in_hf = renamed_for(read(path, alpha=ALPHA), model)
    with pytest.raises(lk.LorakitError, match=r"heads=.*kv_heads="):
        write(in_hf, tmp_path / "b", "torchtune")
    with pytest.raises(lk.LorakitError, match="12 rows are not 4 heads of 6"):
        write(in_hf, tmp_path / "b", "torchtune", heads=HEADS, kv_heads=HEADS)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(lk.LorakitError, match="heads="):
        renamed_for(read(path, alpha=ALPHA), names)
    assert_bits(renamed_for(read(path, alpha=ALPHA), names, heads=HEADS).state_dict(), in_hf.state_dict())


def test_torchtune_on_a_part_of_a_model(tmp_path):
    model = llama()
    path = tune_files(tmp_path / "a", tune_tensors())
    lk.load(model, path)
    wanted = model.model(IDS).last_hidden_state
    inner = llama().model
    lk.load(inner, path)
    assert_close(inner(IDS).last_hidden_state, wanted)
    with pytest.raises(lk.LorakitError, match=r"no name in transformers|the model has no"):
        lk.load(nn.Linear(2, 2), path)


# LitGPT


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


# GGUF


def gguf_file(path, tensors: dict[str, np.ndarray], alpha: float = ALPHA, arch: str = "llama", **values):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in values.items():
        writer.add_array(key.replace("__", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_gguf(path) -> tuple[dict[str, Tensor], float]:
    """The tensors, with torch's order of axes, and alpha, as the package reads them."""
    found = gguf.GGUFReader(path)
    dtypes = {gguf.GGMLQuantizationType.BF16: torch.bfloat16}
    tensors = {}
    for each in found.tensors:
        shape = [int(size) for size in reversed(each.shape)]
        tensor = torch.from_numpy(np.array(each.data))
        tensors[each.name] = tensor.view(dtypes.get(each.tensor_type, tensor.dtype)).reshape(shape)
    return tensors, float(found.fields["adapter.lora.alpha"].contents())


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_deltas(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """ΔW by transformers' names, from what llama.cpp computes of such a file."""
    deltas = {}
    for i in range(2):
        for hf, own in GGUF_NAMES.items():
            if f"blk.{i}.{own}.weight.lora_a" not in tensors:
                continue
            A, B = (tensors[f"blk.{i}.{own}.weight.lora_{letter}"].float() for letter in "ab")
            delta = (alpha / A.shape[0] if alpha else 1.0) * B @ A
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(own)
            if heads:  # the converter has reshape(heads, 2, rows // heads // 2, ...).swapaxes(1, 2)
                delta = delta.view(heads, SIZE // 2, 2, -1).transpose(1, 2).reshape(delta.shape)
            deltas[f"model.layers.{i}.{hf}"] = delta
    if "token_embd.weight.lora_a" in tensors:
        a, b = (tensors[f"token_embd.weight.lora_{letter}"].float() for letter in "ab")
        deltas["model.embed_tokens"] = (alpha / a.shape[1] if alpha else 1.0) * a @ b.T  # rows of a, then b
    return deltas


def gguf_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {hf: (d, k) for hf, d, k in TUNE.values()}
    found = {}
    for i in range(2):
        for hf, own in GGUF_NAMES.items():
            d, k = sizes[hf]
            found[f"blk.{i}.{own}.weight.lora_a"] = (random.normal(size=(R, k)) * 0.3).astype(dtype)
            found[f"blk.{i}.{own}.weight.lora_b"] = (random.normal(size=(d, R)) * 0.3).astype(dtype)
    found["token_embd.weight.lora_a"] = (random.normal(size=(31, R)) * 0.3).astype(dtype)
    found["token_embd.weight.lora_b"] = (random.normal(size=(WIDTH, R)) * 0.3).astype(dtype)
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("alpha", [ALPHA, 0.0])
def test_gguf_loads_to_what_llama_cpp_computes(alpha, dtype, tmp_path):
    path = gguf_file(tmp_path / "a.gguf", gguf_tensors(dtype), alpha)
    tensors = {key: torch.from_numpy(value) for key, value in gguf_tensors(dtype).items()}
    assert_bits(dict(sorted(read_content(path).tensors.items())), dict(sorted(tensors.items())))
    model = llama()
    wanted = with_deltas(model, llama_cpp_deltas(tensors, alpha))
    lk.load(model, path)
    assert_close(logits(model), wanted, factor=10)
    write(read(path), tmp_path / "b.gguf", "gguf")
    again, alpha_again = by_gguf(tmp_path / "b.gguf")
    assert_bits(dict(sorted(again.items())), dict(sorted(tensors.items())))
    assert alpha_again == alpha


CASES = {
    "plain": (None, {}),
    "bf16": (None, {}),
    "rslora": (lk.LoRA(rank=R, alpha=ALPHA, scaling="rslora"), {}),
    "alphas": (lk.LoRA(rank=R, alpha=ALPHA), {"alphas": {"k_proj": 2.0}}),
    "ranks": (lk.LoRA(rank=R), {"ranks": {"k_proj": 5}}),
    "an alpha of more than 32 bits": (lk.LoRA(rank=R, alpha=0.1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_is_written_for_it(case, tmp_path):
    method, more = CASES[case]
    model = trained(llama(), [*TARGETS, "embed_tokens"], method, **more)
    value = adapter_value(model)
    if case == "bf16":
        cut = {weight.name: {k: t.bfloat16() for k, t in weight.tensors.items()} for weight in value.weights}
        value = value.with_weights(weight._replace(tensors=cut[weight.name]) for weight in value.weights)
    write(value, tmp_path / "a.gguf", "gguf", arch="llama", heads=HEADS, kv_heads=GROUPS)
    tensors, alpha = by_gguf(tmp_path / "a.gguf")
    assert len(tensors) == 30
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.type"].contents() == "adapter" and fields["adapter.type"].contents() == "lora"
    assert fields["general.architecture"].contents() == "llama"
    if case == "bf16":
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    wanted = with_deltas(llama(), llama_cpp_deltas(tensors, alpha))
    again = llama()
    lk.load(again, tmp_path / "a.gguf")
    assert_close(logits(again), wanted, factor=10)
    if case != "bf16":  # the model has the factors before they were rounded
        assert_close(logits(model), wanted, factor=10)


def test_gguf_of_a_family_whose_rows_are_not_reordered(tmp_path):
    model = trained(llama(transformers.Qwen2ForCausalLM, transformers.Qwen2Config))
    value = adapter_value(model)
    write(value, tmp_path / "a.gguf", "gguf", arch="qwen2")
    tensors, _ = by_gguf(tmp_path / "a.gguf")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_b"], value.state_dict()[key])
    again = llama(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
    lk.load(again, tmp_path / "a.gguf")
    assert_bits(lk.adapter_state_dict(again), lk.adapter_state_dict(model))


def test_gguf_refuses_what_it_cannot_hold(tmp_path):
    model = trained(llama(), ["q_proj"], lk.DoRA(rank=2))
    with pytest.raises(lk.LorakitError, match="arch="):
        write(adapter_value(model), tmp_path / "a.gguf", "gguf")
    with pytest.raises(lk.LorakitError, match=r"DoRA.*heads="):
        try:
            write(adapter_value(model), tmp_path / "a.gguf", "gguf", arch="llama")
        except lk.LorakitError as error:
            raise lk.LorakitError(" ".join(sorted(str(error).split("\n"), reverse=True))) from None
    with pytest.raises(lk.LorakitError, match="no architecture 'lama'"):
        write(adapter_value(model), tmp_path / "a.gguf", "gguf", arch="lama", heads=4)
    assert not list(tmp_path.iterdir())


def test_gguf_that_acts_after_some_tokens_is_refused(tmp_path):
    path = gguf_file(tmp_path / "a.gguf", gguf_tensors(), adapter__alora__invocation_tokens=[1, 2])
    with pytest.raises(lk.LorakitError, match="invocation_tokens"):
        read(path)


def test_gguf_norms_are_left_out_as_llama_cpp_does(tmp_path):
    path = gguf_file(tmp_path / "a.gguf", {**gguf_tensors(), "blk.0.attn_norm.weight": np.ones(4, np.float32)})
    assert "blk.0.attn_norm.weight" in read(path).left_out[0]
    with pytest.warns(UserWarning, match="attn_norm"):
        lk.load(llama(), path)


def test_gguf_of_stacked_experts(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "blk.0.ffn_up_exps.weight.lora_a": random.normal(size=(3, 2, 8)).astype(np.float32),
        "blk.0.ffn_up_exps.weight.lora_b": random.normal(size=(3, 5, 2)).astype(np.float32),
    }
    value = read(gguf_file(tmp_path / "a.gguf", tensors, 4.0))
    B, A = value.weights[0].product()
    wanted = 2 * tensors["blk.0.ffn_up_exps.weight.lora_b"] @ tensors["blk.0.ffn_up_exps.weight.lora_a"]
    assert value.weights[0].stacked
    assert_close(B @ A, torch.from_numpy(wanted), factor=4)
    write(value, tmp_path / "b.gguf", "gguf")
    assert_bits(by_gguf(tmp_path / "b.gguf")[0], {key: torch.from_numpy(each) for key, each in tensors.items()})


def test_quantized_gguf_is_dequantized_by_the_package(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(rows, kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_tensor("output.weight.lora_a", packed, raw_dtype=kind)
    writer.add_tensor("output.weight.lora_b", np.ones((5, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    assert torch.equal(read_content(tmp_path / "a.gguf").tensors["output.weight.lora_a"], wanted)
    assert torch.equal(read(tmp_path / "a.gguf").weights[0].tensors["A"], wanted)
