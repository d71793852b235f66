"""What is written here acts in PEFT and in transformers as it does here, and PEFT's own comes back to the bit."""

import copy
import json
import warnings

import pytest
import torch
from helpers import attached, randomize
from safetensors import safe_open
from safetensors.torch import load_file
from test_peft_reading import CASES as THEIRS
from test_peft_reading import IDS, conv, gpt_oss, llama, made, mixtral, out, saved, tables
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # PEFT looks for them among modules, and applies those of parameters all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=32)
    )


def classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"vocab_size": 31, "num_labels": 3, "pad_token_id": 0},
        )
    )


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(31, 6), nn.Linear(6, 4))


def qwen_moe() -> nn.Module:
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"vocab_size": 31, "num_key_value_heads": 1, "moe_intermediate_size": 8},
            **{"shared_expert_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        )
    )


EXPERTS = ["gate_up_proj", "down_proj"]
PLAIN, SCALED = lk.LoRA(rank=2, alpha=3), lk.LoRA(rank=3, alpha=4, scaling="rslora")
CASES = {
    "linear": (llama, PLAIN, {"targets": "all-linear"}),
    "rslora": (llama, SCALED, {"targets": ["q_proj", "v_proj"]}),
    "patterns": (
        llama,
        SCALED,
        {"targets": ["q_proj", "v_proj"], "ranks": {"*.0.self_attn.q_proj": 5}, "alphas": {"v_proj": 1.5}},
    ),
    "pissa": (llama, lk.LoRA(rank=2, alpha=3, init="pissa"), {"targets": ["q_proj", "down_proj"]}),
    "olora": (llama, lk.LoRA(rank=2, init="olora", scaling="rslora"), {"targets": ["v_proj", "down_proj"]}),
    "dora": (llama, lk.DoRA(rank=2, alpha=3), {"targets": ["v_proj", "down_proj"]}),
    "conv1d": (gpt2, PLAIN, {"targets": ["c_attn", "c_proj"]}),
    "conv": (conv, PLAIN, {"targets": ["0", "2"]}),
    "conv-dora": (conv, lk.DoRA(rank=2), {"targets": ["0", "2"]}),
    "embedding": (words, PLAIN, {"targets": ["0", "1"]}),
    "embedding-llama": (llama, PLAIN, {"targets": ["embed_tokens", "q_proj"]}),
    "whole": (classifier, PLAIN, {"targets": ["q_proj", "v_proj"], "train_also": "score"}),
    "norms": (llama, PLAIN, {"targets": "v_proj", "train_also": "*layernorm"}),
    "bias": (words, PLAIN, {"targets": "1", "train_also": "1.bias"}),
    "rows": (llama, PLAIN, {"targets": ["v_proj"], "train_rows": {"embed_tokens": [7, 9]}}),
    "mixtral": (mixtral, PLAIN, {"targets": [*EXPERTS, "q_proj"], "ranks": {"*.0.mlp.experts.down_proj": 4}}),
    "mixtral-one": (mixtral, SCALED, {"targets": "gate_up_proj"}),
    "mixtral-pissa": (mixtral, lk.LoRA(rank=2, init="pissa"), {"targets": EXPERTS, "alphas": {"down_proj": 1}}),
    "gpt-oss": (gpt_oss, PLAIN, {"targets": [*EXPERTS, "v_proj"]}),
    "qwen-moe": (qwen_moe, PLAIN, {"targets": [f"experts.{name}" for name in EXPERTS]}),
    "matrices": (tables, PLAIN, {"targets": ["0", "1.a", "1.z"], "ranks": {"1.a": 3}}),
}


def ours(case: str) -> tuple[nn.Module, Tensor, nn.Module]:
    """The base, an input, and the model with an adapter of noise."""
    make, variant, how = CASES[case]
    torch.manual_seed(0)
    base = make().eval()
    known = hasattr(base, "config") or make is words
    x = IDS if known else torch.randn(2, 1, 2, 3) if make is conv else torch.randn(3, 4)
    return base, x, attached(copy.deepcopy(base), variant, **how)


def assert_equal_outputs(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max().item() <= 1e-6 * max(1.0, wanted.abs().max().item())


@torch.no_grad()
def by_peft(base: nn.Module, x: Tensor, path) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it is then set to True
        return out(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval(), x)


@pytest.mark.parametrize("way", ["save", "peft", "value"])
@pytest.mark.parametrize("case", CASES)
def test_peft_and_transformers_compute_what_we_do(case, way, tmp_path):
    base, x, model = ours(case)
    if way == "save":
        lk.save(model, tmp_path / "a")
    elif way == "peft":
        lost = write(adapter_value(model), tmp_path / "a", "peft")
        assert "fingerprints" in lost[0]
    else:
        lk.save(model, tmp_path / "first")
        write(read(tmp_path / "first"), tmp_path / "a")
    wanted = out(model, x)
    assert (wanted - out(base, x)).abs().max() > 1e-3
    assert_equal_outputs(by_peft(base, x, tmp_path / "a"), wanted)
    if hasattr(base, "load_adapter"):
        theirs = copy.deepcopy(base)
        theirs.load_adapter(str(tmp_path / "a"))
        if case == "dora":  # it loses the magnitudes, those of PEFT's own files too
            assert (out(theirs.eval(), x) - wanted).abs().max() > 1e-3
        else:
            assert_equal_outputs(out(theirs.eval(), x), wanted)
    lk.load(base, tmp_path / "a")
    assert_equal_outputs(out(base, x), wanted)


def test_what_is_written_as_peft_has_nothing_of_ours(tmp_path):
    _, _, model = ours("linear")
    write(adapter_value(model), tmp_path / "a", "peft")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it does not know
        known = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert set(config) <= set(vars(known))
    assert read(tmp_path / "a").format == "peft"


KEPT = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
)


NO_WAY_BACK = ("embedding", "lora-bias", "tables-below")
"""A copy of the base is not kept, an added bias becomes the bias, and layers in a wrapped module are refused."""


@pytest.mark.parametrize("case", [case for case in THEIRS if not case.startswith(NO_WAY_BACK)])
def test_from_peft_and_back_is_equal_to_the_bit(case, tmp_path):
    base, x, theirs = made(case)
    theirs.peft_config["default"].base_model_name_or_path = "who/what"
    theirs.peft_config["default"].revision = "v2"
    if hasattr(base, "config"):
        theirs.peft_config["default"].task_type = "CAUSAL_LM"
    saved(theirs, tmp_path / "a")
    write(renamed_for(read(tmp_path / "a"), base), tmp_path / "b", "peft")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype, key
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert {key: first[key] for key in KEPT} == {key: second[key] for key in KEPT}
    assert_equal_outputs(by_peft(base, x, tmp_path / "b"), out(theirs, x))


BEYOND = {
    "slices": (nn.MultiheadAttention(8, 2), {"targets": "q_proj_weight"}, "no layer's whole weight"),
    "stack-of-dora": (None, {"targets": "down_proj", "variant": lk.DoRA(rank=1)}, "no layer's whole weight"),
    "transposed": (nn.Sequential(nn.ConvTranspose1d(2, 2, 2)), {"targets": "0"}, "TransposedConvolution"),
    "groups": (nn.Sequential(nn.Conv1d(4, 4, 2, groups=2)), {"targets": "0"}, "groups"),
    "circular": (nn.Sequential(nn.Conv1d(4, 4, 3, padding_mode="circular", padding=1)), {"targets": "0"}, "circular"),
    "dilated": (nn.Sequential(nn.Conv1d(4, 4, 3, padding="same", dilation=2)), {"targets": "0"}, "dilation"),
    "max-norm": (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), {"targets": "0"}, "max_norm"),
    "read": (nn.MultiheadAttention(8, 2), {"targets": "out_proj"}, "no layer's whole weight"),
    "read-in-encoder": (
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        {"targets": "linear1", "mode": "beside"},
        "past the layer",
    ),
    "list": (nn.Sequential(nn.ParameterList([torch.ones(2, 2)])), {"targets": "0.0"}, "no layer's whole weight"),
    "root": (tables()[1], {"targets": "z"}, "no layer's whole weight"),
    "inside": (tables(), {"targets": ["1.z", "1.below"]}, "which PEFT wraps"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_peft_cannot_have_is_named(case, tmp_path):
    model, how, word = BEYOND[case]
    how = dict(how)
    model = mixtral() if model is None else copy.deepcopy(model)
    attached(model, how.pop("variant", lk.LoRA(rank=1)), **how)
    lk.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORAKIT" and word in config["reasons"][0]
    if case not in ("groups", "circular", "dilated", "max-norm", "read-in-encoder"):  # what a live model alone tells
        with pytest.raises(lk.LorakitError, match=word):
            write(adapter_value(model), tmp_path / "b", "peft")


@pytest.mark.parametrize("case", CASES)
def test_the_one_file_holds_what_the_directory_does(case, tmp_path):
    _, _, model = ours(case)
    lk.save(model, tmp_path / "a")
    lk.save(model, tmp_path / "a.safetensors")
    one, other = read(tmp_path / "a"), read(tmp_path / "a.safetensors")
    assert one.header == other.header and one.header.facts == other.header.facts
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    for name in ("name", "variant", "format", "ours", "missing", "naming", "left_out"):
        assert getattr(one, name) == getattr(other, name)


def test_stacks_of_files_without_a_place_are_read_as_they_were(tmp_path):
    base, x, model = ours("mixtral")
    value = adapter_value(model)
    value = value.with_weights(weight._replace(entry=weight.entry._replace(order=None)) for weight in value.weights)
    write(value, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    lk.load(base, tmp_path / "a")
    assert torch.equal(out(base, x), out(model, x))


def test_a_part_of_a_stack_s_adapter_is_laid_out_anew(tmp_path):
    base, x, model = ours("mixtral")
    value = adapter_value(model)
    kept = [weight for weight in value.weights if weight.entry.parameter == "gate_up_proj"]
    write(value.with_weights(kept), tmp_path / "a", "peft")
    assert not any("base_layer" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    lk.load(base, tmp_path / "a")
    assert_equal_outputs(by_peft(mixtral_again(), x, tmp_path / "a"), out(base, x))


def mixtral_again() -> nn.Module:
    torch.manual_seed(0)
    return mixtral().eval()


def test_training_goes_on_from_a_stack_that_was_saved(tmp_path):
    base, x, model = ours("mixtral-pissa")
    lk.save(model, tmp_path / "a")
    lk.load(base, tmp_path / "a", trainable=True)
    assert torch.equal(out(base, x), out(model, x))
    randomize(base, next(iter(lk.adapters(base))), seed=5)
    randomize(model, seed=5)
    assert torch.equal(out(base, x), out(model, x))
