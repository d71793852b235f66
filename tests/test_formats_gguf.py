"""llama.cpp's adapters: its names, one scale for all, reordered rows, quantized tensors."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from helpers import assert_bits, assert_close
from llamas import ALPHA, GROUPS, HEADS, IDS, SIZE, TARGETS, WIDTH, R, llama, logits, trained, with_deltas
from test_formats_torchtune import TUNE
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import read_content

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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


@torch.no_grad()
def merged_inner(model: nn.Module) -> Tensor:
    return model.model(IDS).last_hidden_state


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
    write(renamed_for(read(path), model), tmp_path / "native")
    in_hf = read(tmp_path / "native")
    write(in_hf, tmp_path / "c.gguf", "gguf", arch="llama", heads=HEADS, kv_heads=GROUPS)
    again, alpha_again = by_gguf(tmp_path / "c.gguf")
    assert_bits(dict(sorted(again.items())), dict(sorted(tensors.items())))
    assert alpha_again == alpha
    inner = llama().model
    lk.load(inner, path)
    lk.merge(inner)
    assert_close(inner(IDS).last_hidden_state, merged_inner(model), factor=10)


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
