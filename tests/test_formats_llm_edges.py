"""Where the formats of language-model tools meet: what is given, other models' names, facts that lie, mixed scales."""

import json
import warnings

import loralib
import pytest
import torch
from helpers import assert_bits, assert_close
from llamas import GROUPS, HEADS, llama, logits, trained
from safetensors.torch import load_file, save_file
from test_formats_litgpt import ENABLED, lit_files, lit_tensors
from test_formats_loralib import IDS, SHARED, Net, by_loralib
from test_formats_mlx import by_mlx, mlx_files, up_to_qkv
from test_formats_torchtune import tune_files, tune_tensors
from torch import nn

import lorakit as lk
from lorakit.exchange import read, write
from lorakit.files import adapter_value
from lorakit.formats import Known, read_content
from lorakit.header import file_key
from lorakit.values.adapter import Adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    "given",
    [
        {"alpha": float("nan")},
        {"alpha": 0},
        {"alpha": "8"},
        {"heads": 0},
        {"heads": "4"},
        {"heads": 2**40},
        {"kv_heads": -1},
        {"enabled": ()},
        {"enabled": (False, False)},
        {"enabled": ("q", "v")},
    ],
    ids=str,
)
def test_what_is_given_is_checked(given):
    with pytest.raises(lk.LorakitError, match=next(iter(given))):
        Known(**given)


def test_ones_and_zeros_are_which_parts_are_adapted(tmp_path):
    _, live = by_loralib()
    torch.save(loralib.lora_state_dict(live), tmp_path / "a.pt")
    write(read(tmp_path / "a.pt", alpha=1, enabled=[1, 0, 1]), tmp_path / "b.pt", "loralib")
    assert_bits(torch.load(tmp_path / "b.pt"), loralib.lora_state_dict(live))


def test_loralib_on_gpt2_whose_weights_lie_the_other_way(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=31, n_positions=16)
    bare, live = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    live.load_state_dict(bare.state_dict())
    enabled = [True, False, True]
    merged = loralib.MergedLinear(12, 36, r=2, lora_alpha=6, enable_lora=enabled, fan_in_fan_out=True)
    attention = live.transformer.h[0].attn
    with torch.no_grad():
        merged.weight.copy_(attention.c_attn.weight)
        merged.bias.copy_(attention.c_attn.bias)
        merged.lora_B.normal_()
    attention.c_attn = merged
    torch.save(loralib.lora_state_dict(live), tmp_path / "a.bin")
    assert read(tmp_path / "a.bin").format == "loralib"
    lk.load(bare, tmp_path / "a.bin", alpha=6, enabled=enabled)
    assert_close(logits(bare), logits(live), factor=10)


def test_loralib_in_safetensors(tmp_path):
    bare, live = by_loralib()
    save_file(loralib.lora_state_dict(live), tmp_path / "a.safetensors")
    lk.load(bare, tmp_path / "a.safetensors", alpha=5, enabled=(True, False, True))
    assert_close(bare(IDS), live(IDS), factor=10)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@torch.no_grad()
def test_mlx_computes_what_is_written_for_it(scaling, tmp_path):
    model = Net()
    lk.attach(model, lk.LoRA(rank=2, alpha=3, scaling=scaling), ["fc", "embed"], ranks={"embed": 3}, alphas={"fc": 7})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    lost = write(adapter_value(model), tmp_path / "a", "mlx")
    assert any("filled up with zeros" in each for each in lost)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_parameters"]
    tensors = load_file(tmp_path / "a" / "adapters.safetensors")
    assert config["rank"] == 3 and {tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("_a")} == {3}
    assert_close(up_to_qkv(model, IDS), by_mlx(tensors, config["scale"], IDS), factor=10)


def test_mlx_parameters_that_were_all_trained(tmp_path):
    model, other = Net(), Net()
    with torch.no_grad():
        other.fc.weight += 1
        other.embed.weight += 1
    tensors = {key: other.state_dict()[key] for key in ("fc.weight", "embed.weight")}
    path = mlx_files(tmp_path / "a", tensors, {"fine_tune_type": "full", "num_layers": 2})
    lk.load(model, path)
    assert_close(up_to_qkv(model, IDS), up_to_qkv(other, IDS))


def test_half_precision_is_folded_in_full(tmp_path):
    """A scale folded into 16 bits would cost digits; the factors that have one become of 32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    lk.attach(model, lk.LoRA(rank=2, alpha=2), "all-linear", alphas={"1": 3})
    value = adapter_value(model)
    half = [
        w._replace(tensors={k: torch.randn(t.shape).bfloat16() for k, t in w.tensors.items()}) for w in value.weights
    ]
    value = value.with_weights(half)
    write(value, tmp_path / "a.pt", "loralib")
    found = torch.load(tmp_path / "a.pt")
    assert found["0.lora_B"].dtype is torch.bfloat16 and found["1.lora_B"].dtype is torch.float32
    assert torch.equal(found["1.lora_B"].double(), value.weights[1].tensors["B"].double() * 1.5)


class Pictures(nn.Module):
    """A language model beside a vision tower whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = llama()
        self.vision_tower = llama().model

    def forward(self, ids):
        return self.language_model(ids)


@pytest.mark.parametrize("form", ["torchtune", "litgpt"])
def test_a_vision_tower_is_not_taken_for_the_language_model(form, tmp_path):
    enabled = (True, True, True)
    if form == "torchtune":
        path = tune_files(tmp_path / "a", tune_tensors())
    else:
        path = lit_files(tmp_path / "a", lit_tensors(enabled), enabled)
    model, alone = Pictures(), llama()
    lk.load(alone, path)
    lk.load(model, path, heads=HEADS, kv_heads=GROUPS)
    assert_close(logits(model), logits(alone))
    value = adapter_value(trained(Pictures(), ["vision_tower.layers.0.self_attn.q_proj"]))
    with pytest.raises(lk.LorakitError, match="vision_tower"):
        write(value, tmp_path / "b", form, **({"heads": HEADS} if form == "torchtune" else {}))


LIES = [None, 5, "x", [], {"merged": 5}, {"merged": {"fc": 7, "qkv": [1, 2]}, "enabled": "x"}, {"heads": -1}]
LIES += [{"heads": 2**60, "kv_heads": 1, "enabled": [True] * 3}, {"scale": "x", "arch": 5, "alpha": []}]


@pytest.mark.parametrize("lie", LIES, ids=repr)
@pytest.mark.parametrize("form", ["loralib", "mlx", "litgpt", "torchtune", "gguf"])
def test_facts_in_a_file_are_no_more_trusted_than_its_tensors(form, lie, tmp_path):
    """A native file can say anything of how the adapter was read once."""
    model = llama()
    value = adapter_value(trained(model))
    honest = Adapter(value.name, value.variant, value.weights, facts={**value.facts, form: lie})
    write(honest, tmp_path / "native")
    again = read(tmp_path / "native")
    known = {"heads": HEADS, "kv_heads": GROUPS} if form in ("torchtune", "gguf") else {}
    write(
        again,
        tmp_path / ("b.pt" if form == "loralib" else "b"),
        form,
        **known,
        **({"arch": "llama"} if form == "gguf" else {}),
    )
    fused = [w._replace(entry=w.entry._replace(path="transformer.h.0.attn.qkv")) for w in value.weights[:1]]
    try:
        write(honest.with_weights(fused), tmp_path / "c", "litgpt")
    except lk.LorakitError as error:
        assert "transformer.h.0.attn.qkv" in str(error)


def changed(tensors, key, value):
    return {**tensors, key: value}


Q = "layers.0.attn.q_proj"
TUNE_DAMAGE = {
    "one factor": (
        {k: v for k, v in tune_tensors().items() if not k.endswith("q_proj.lora_b.weight")},
        "lacks its factor B",
    ),
    "nan": (changed(tune_tensors(), f"{Q}.lora_a.weight", torch.full((3, 16), float("nan"))), "NaN"),
    "scalar": (changed(tune_tensors(), f"{Q}.lora_a.weight", torch.tensor(1.0)), "no matrix"),
    "dtype": (changed(tune_tensors(), f"{Q}.lora_b.weight", torch.ones(24, 3).int()), "int32"),
    "rank": (changed(tune_tensors(), f"{Q}.lora_a.weight", torch.ones(2, 16)), "rank 3"),
    "odd rows": (changed(tune_tensors(), f"{Q}.lora_b.weight", torch.ones(23, 3)), "23 rows"),
    "rows": (changed(tune_tensors(), f"{Q}.lora_b.weight", torch.ones(48, 3)), "48 rows"),
    "magnitude": (changed(tune_tensors(), f"{Q}.magnitude", torch.ones(23)), "magnitude"),
    "name": (changed(tune_tensors(), "layers.0.mlp.w9.lora_a.weight", torch.ones(3, 3)), "w9"),
    "layer": (
        changed(tune_tensors(), "layers.7.mlp.w1.lora_a.weight", torch.ones(3, 16))
        | {"layers.7.mlp.w1.lora_b.weight": torch.ones(20, 3)},
        "layers.7.mlp.gate_proj",
    ),
}


@pytest.mark.parametrize("case", TUNE_DAMAGE)
def test_damaged_torchtune(case, tmp_path):
    tensors, words = TUNE_DAMAGE[case]
    with pytest.raises(lk.LorakitError, match=words):
        lk.load(llama(), tune_files(tmp_path / "a", tensors))


FUSED = "transformer.h.0.attn.qkv"
LIT = lit_tensors((True, False, True))
LIT_DAMAGE = {
    "one factor": ({k: v for k, v in LIT.items() if k != f"{FUSED}.lora_B"}, "lacks its factor B"),
    "nan": (changed(LIT, f"{FUSED}.lora_B", torch.full((36, 3), float("nan"))), "NaN"),
    "scalar": (changed(LIT, f"{FUSED}.lora_B", torch.tensor(1.0)), "no matrix"),
    "dtype": (changed(LIT, f"{FUSED}.lora_B", torch.ones(36, 3).bool()), "bool"),
    "rows": (changed(LIT, f"{FUSED}.lora_B", torch.ones(37, 3)), "37 rows are none of 4 heads"),
    "other heads": (changed(LIT, f"{FUSED}.lora_B", torch.ones(72, 3)), "its heads have 12 rows, and 6"),
    "parts": (changed(LIT, f"{FUSED}.lora_A", torch.ones(9, 16)), "3 of q, k, v are adapted"),
    "rank": (changed(LIT, "transformer.h.0.attn.proj.lora_A", torch.ones(2, 24)), "no factors"),
    "name": (
        changed(LIT, "transformer.h.0.mlp.fc.lora_A", torch.ones(3, 16))
        | {"transformer.h.0.mlp.fc.lora_B": torch.ones(20, 3)},
        "no name in a Llama-like model",
    ),
}


@pytest.mark.parametrize("case", LIT_DAMAGE)
def test_damaged_litgpt(case, tmp_path):
    tensors, words = LIT_DAMAGE[case]
    with pytest.raises(lk.LorakitError, match=words):
        lk.load(llama(), lit_files(tmp_path / "a", tensors, (True, False, True)))


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_litgpt_files_of_one_kind_have_one_rank_and_one_scale(enabled, tmp_path):
    names = [f"{name}_proj" for name, on in zip("qkv", enabled, strict=True) if on]
    model = trained(llama(), names, ranks={names[0]: 5}, alphas={names[-1]: 1.5})
    write(adapter_value(model), tmp_path / "a", "litgpt")
    content = read_content(tmp_path / "a")
    assert content.config["lora_r"] == max(t.shape[1] for key, t in content.tensors.items() if key.endswith("B"))
    again = llama()
    lk.load(again, tmp_path / "a")
    assert_close(logits(again), logits(model), factor=10)


def test_a_name_for_both_kinds_of_layers_is_taken_only_where_the_file_does_not_say(tmp_path):
    """Factors under linear layers' names load onto an embedding; those of a linear layer that says so do not."""
    model = nn.ModuleDict({"x": nn.Linear(6, 6)})
    lk.attach(model, lk.LoRA(rank=2), "all-linear")
    lk.save(model, tmp_path / "a.safetensors")
    with pytest.raises(lk.LorakitError, match="lora_embedding_A"):
        lk.load(nn.ModuleDict({"x": nn.Embedding(6, 6)}), tmp_path / "a.safetensors", verify="off")
    assert file_key("x", "weight", "lora_A.weight", True).endswith("lora_embedding_A")


def test_a_directory_is_needed_where_the_config_is_half_of_it(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for form in ("mlx", "litgpt", "torchtune"):
        value = adapter_value(trained(llama()))
        with pytest.raises(lk.LorakitError, match="name a directory"):
            write(value, tmp_path / "a.safetensors", form, **({"heads": HEADS} if form == "torchtune" else {}))


def test_mlx_config_keys_reach_every_layer(tmp_path):
    write(adapter_value(trained(llama(), ["layers.1.self_attn.q_proj", "lm_head"])), tmp_path / "a", "mlx")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["num_layers"] == -1 and config["lora_parameters"]["keys"] == ["self_attn.q_proj", "lm_head"]
    assert read(tmp_path / "a").format == "mlx"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real adapters in $LORAKIT_SHARED/adapters")
@torch.no_grad()
def test_the_paper_s_own_adapter_loads_onto_its_architecture():
    """Factors and the classifier, which was trained as a whole, on a base of the same shapes with few words."""
    file = SHARED / "loralib-roberta-base-mnli" / "roberta_base_lora_mnli.bin"
    config = transformers.RobertaConfig(vocab_size=9, intermediate_size=16, num_labels=3, max_position_embeddings=16)
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(config).eval()
    ids = torch.tensor([[0, 5, 7, 2]])
    tensors = read_content(file).tensors
    plan = lk.load(model, file, alpha=16)
    got = model(ids).logits
    lk.detach(model)
    for key, value in tensors.items():
        if key.endswith("lora_A"):
            B = tensors[key[:-1] + "B"]
            model.get_parameter(key.replace("lora_A", "weight")).add_(16 / 8 * B @ value)
        elif not key.endswith("lora_B"):
            model.get_parameter(key).copy_(value)
    assert str(plan)
    assert_close(got, model(ids).logits, factor=10)
