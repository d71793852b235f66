"""torchtune's adapters: names of its own, and rows of q and k as Meta has them."""

import json
import warnings

import pytest
import torch
from helpers import assert_bits, assert_close
from llamas import ALPHA, GROUPS, HEADS, IDS, SIZE, WIDE, WIDTH, R, llama, logits, with_deltas
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
