"""Every case of PEFT's directory, made by PEFT and read here: the outputs are PEFT's, or the right ones."""

import copy
import json
import warnings

import pytest
import torch
from helpers import assert_close, dense, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read, renamed_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"vocab_size": 31, "num_key_value_heads": 1, "max_position_embeddings": 32},
}
MOE = {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}
IDS = torch.tensor([[1, 7, 2, 9], [8, 3, 8, 4]])


def llama(**more) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **more))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE))


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**MOE, head_dim=8))


def biased() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(2), nn.Linear(2, 4))


class Table(nn.Module):
    """Two matrices that it reads, declared in an order that is not that of their names, and a layer below."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(4, 4))
        self.a = nn.Parameter(torch.randn(4, 4))
        self.below = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.below(torch.tanh(x @ self.z.T) @ self.a.T)


def tables() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Table())


class Experts(nn.Module):
    """A stack that multiplies from the right, or from the left."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.up, self.down) if self.is_transposed else (self.down.mT, self.up.mT)
        return (torch.tanh(x @ first) @ second).sum(0)


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": (llama, {"target_modules": ["v_proj", "down_proj"], "use_dora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.0.*q_proj": 4, "v_proj": 1},
            "alpha_pattern": {"1.self_attn.v_proj": 9},
        },
    ),
    "bias-all": (biased, {"target_modules": ["0"], "bias": "all"}),
    "bias-lora-only": (biased, {"target_modules": ["0", "2"], "bias": "lora_only"}),
    "lora-bias": (biased, {"target_modules": ["0", "2"], "lora_bias": True, "alpha_pattern": {"2": 1}}),
    "lora-bias-rslora": (biased, {"target_modules": ["0"], "lora_bias": True, "use_rslora": True}),
    "lora-bias-conv": (conv, {"target_modules": ["0", "2"], "lora_bias": True}),
    "modules-to-save": (biased, {"target_modules": ["0"], "modules_to_save": ["3"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 8]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["down_proj", "experts.gate_up_proj"]}),
    "mixtral-one": (mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "mixtral-ranks": (
        mixtral,
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"0.mlp.experts.down_proj": 4},
            "alpha_pattern": {"experts.gate_up_proj": 3},
        },
    ),
    "gpt-oss": (gpt_oss, {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "tables": (tables, {"target_modules": ["0"], "target_parameters": ["1.a", "1.z"]}),
    "tables-below": (tables, {"target_modules": ["below"], "target_parameters": ["1.a"]}),
    "bare-names": (tables, {"target_modules": ["0"], "target_parameters": ["z"]}),
    "a-layer-s-weight": (biased, {"target_modules": [], "target_parameters": ["2.weight"]}),
    "stack": (
        lambda: nn.Sequential(nn.Tanh(), Experts(False)),
        {"target_modules": [], "target_parameters": ["up", "down"]},
    ),
    "stack-transposed": (
        lambda: nn.Sequential(nn.Tanh(), Experts(True)),
        {"target_modules": [], "target_parameters": ["up", "down"]},
    ),
}


def trained(base: nn.Module, config, name: str = "default") -> nn.Module:
    """PEFT's model on a copy, with noise in what it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def made(case: str) -> tuple[nn.Module, Tensor, nn.Module]:
    """The base, an input, and PEFT's model."""
    make, how = CASES[case]
    torch.manual_seed(0)
    base = make().eval()
    x = IDS if hasattr(base, "config") else torch.randn(2, 1, 2, 3) if make is conv else torch.randn(3, 4)
    return base, x, trained(base, peft.LoraConfig(r=2, lora_alpha=5, **how))


@torch.no_grad()
def out(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]


def saved(theirs: nn.Module, path, **how) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(path), **how)


@pytest.mark.filterwarnings("ignore:.*a copy of the base weight")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", CASES)
def test_a_directory_of_peft_gives_peft_s_outputs(case, safe, tmp_path):
    base, x, theirs = made(case)
    saved(theirs, tmp_path / "a", safe_serialization=safe)
    wanted = out(theirs, x)
    assert (wanted - out(base, x)).abs().max() > 1e-3
    model = copy.deepcopy(base)
    lk.load(model, tmp_path / "a")
    assert_close(out(model, x), wanted)
    value = renamed_for(read(tmp_path / "a"), base)  # the same by way of a value
    lk.load(base, value)
    assert torch.equal(out(base, x), out(model, x))


def test_what_needs_the_model_is_not_taken_for_what_it_looks_like(tmp_path):
    base, _, theirs = made("mixtral")
    saved(theirs, tmp_path / "a")
    value = read(tmp_path / "a")
    assert value.naming
    (stack,) = (w for w in value.weights if w.entry.path == "model.layers.0.mlp.experts")
    with pytest.raises(lk.LorakitError, match="model"):
        stack.product()
    with pytest.raises(lk.LorakitError, match="give the model"):
        renamed_for(value, [name for name, _ in base.named_parameters()])
    assert not renamed_for(value, base).naming


def test_attention_has_the_right_formula_where_peft_has_its_output_update_twice(tmp_path):
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)}).eval(), torch.randn(2, 3, 8)
    theirs = trained(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["mha"]))
    saved(theirs, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = "base_model.model.mha"
    assert tensors[f"{stem}.lora_B.weight"].shape == (24, 2)
    products = {
        "mha.in_proj_weight": 1.5 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"],
        "mha.out_proj.weight": 1.5
        * tensors[f"{stem}.base_layer.out_proj.lora_B.weight"]
        @ tensors[f"{stem}.base_layer.out_proj.lora_A.weight"],
    }
    wanted = dense(base, products)["mha"](x, x, x)[0]
    twice = dense(base, {**products, "mha.out_proj.weight": 2 * products["mha.out_proj.weight"]})["mha"](x, x, x)[0]
    theirs_y = theirs.base_model.model["mha"](x, x, x)[0]
    lk.load(base, tmp_path / "a")
    assert_close(base["mha"](x, x, x)[0], wanted)
    assert_close(theirs_y, twice)  # this is what PEFT computes
    assert set(lk.adapters(base)["a"].weights) == {"mha.in_proj_weight", "mha.out_proj.weight"}
    assert read(tmp_path / "a").naming == ""


def test_a_bias_that_the_layer_lacks_is_named(tmp_path):
    base, _, theirs = made("lora-bias")
    saved(theirs, tmp_path / "a")
    base[2] = nn.Linear(4, 4, bias=False)
    with refused(base, "'2'", "no bias", "lora_bias"):
        lk.load(base, tmp_path / "a")


@pytest.mark.parametrize("pruned", [(1, 2), (0, 3), (0, 0)])
def test_adalora_whose_pruned_ranks_are_not_in_the_file(pruned, tmp_path):
    torch.manual_seed(0)
    base, x = biased().eval(), torch.randn(3, 4)
    config = peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=["0", "2"], total_step=9)
    theirs = trained(base, config)
    masks = {}
    for layer, kept in zip(("0", "2"), pruned, strict=True):
        masks[f"model.{layer}.lora_E.default"] = [i >= 3 - kept for i in range(3)]
        with torch.no_grad():
            theirs.get_submodule(f"base_model.model.{layer}").lora_E["default"][: 3 - kept] = 0
    theirs.peft_config["default"].rank_pattern = {k.removeprefix("model."): v for k, v in masks.items()}
    wanted = out(theirs, x)
    saved(theirs, tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.0.lora_A"].shape[0] == pruned[0]
    lk.load(base, tmp_path / "a")
    assert_close(out(base, x), wanted)
    path = tmp_path / "a" / "adapter_config.json"
    good = json.loads(path.read_text())
    for bad in ({"0.lora_E": [True]}, {"9.lora_E": [True] * 3}, [1], {"0.lora_E": [1, 0, 1]}, {"0.lora_E": None}):
        path.write_text(json.dumps({**good, "rank_pattern": bad}))
        with pytest.raises(lk.LorakitError, match="rank_pattern"):
            read(tmp_path / "a")


def test_a_copy_of_the_base_is_verified_and_left_out(tmp_path):
    base, x, theirs = made("embedding")
    saved(theirs, tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    with refused(other, "'lm_head.weight'", "another base"):
        lk.load(other, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"a copy of the base weight 'model\.embed_tokens\.weight'"):
        lk.load(base, tmp_path / "a")
    assert_close(out(base, x), out(theirs, x))


def test_embeddings_that_were_saved_because_they_grew_are_the_file_s(tmp_path):
    base, x, theirs = made("linear")
    with torch.no_grad():
        theirs.get_input_embeddings().weight[5] += 1  # as new rows have values of their own
    saved(theirs, tmp_path / "a", save_embedding_layers=True)
    lk.load(base, tmp_path / "a")
    assert_close(out(base, x + 4), out(theirs, x + 4))


def test_an_adapter_in_a_directory_of_its_name_is_found_or_listed(tmp_path):
    base, x, theirs = made("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = trained(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), "sql")
    saved(second, tmp_path / "a")
    assert (tmp_path / "a" / "sql" / "adapter_config.json").is_file()
    model = copy.deepcopy(base)
    assert lk.load(model, tmp_path / "a").name == "sql"
    assert_close(out(model, x), out(second, x))
    saved(theirs, tmp_path / "a" / "chat")
    with pytest.raises(lk.LorakitError, match="'chat', 'sql'"):
        read(tmp_path / "a")
    saved(theirs, tmp_path / "a")  # "default" lies above them
    assert read(tmp_path / "a").name == "a"


def test_modules_that_the_config_names_and_the_file_lacks_are_an_error(tmp_path):
    _, _, theirs = made("modules-to-save")
    saved(theirs, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file)
    with pytest.raises(lk.LorakitError, match=r"modules_to_save.*'3'"):
        read(tmp_path / "a")


@pytest.mark.parametrize("method", sorted({str(each.value) for each in peft.PeftType}))
def test_every_method_of_peft_is_read_or_refused_by_name(method, tmp_path):
    save_file({"base_model.model.0.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    known = ("LORA", "LOHA", "LOKR", "VERA", "ADALORA")
    with pytest.raises(lk.LorakitError, match="has no 'r'|init_r|projection" if method in known else method):
        read(tmp_path)


DAMAGE = {
    "names": ({"target_parameters": 7}, "target_parameters"),
    "more-names": ({"target_parameters": [3]}, "target_parameters"),
    "none-matches": ({"target_parameters": ["experts.other"]}, "experts"),
    "rank": ({"r": 7}, "rank 7"),
    "huge": ({"r": 2**40}, "rank"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parameters_are_one_error(case, tmp_path):
    change, word = DAMAGE[case]
    base, _, theirs = made("mixtral-one")
    saved(theirs, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refused(base, word):
        lk.load(base, tmp_path / "a")


def test_tensors_of_parameters_in_wrong_shapes_are_one_error(tmp_path):
    base, _, theirs = made("mixtral-one")
    saved(theirs, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    good = load_file(file)
    key = next(key for key in good if "lora_A" in key)
    for bad in (torch.tensor(1.0), torch.ones(7, 24), torch.ones(6, 3), torch.ones(3, 2, 24), torch.ones(6, 24).int()):
        save_file({**good, key: bad}, file)
        with refused(base, "experts"):
            lk.load(base, tmp_path / "a")


FIELDS = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "trainable_token_indices", "bias")
VALUES = (7, "word", [1], ["x"], {"(": 3}, {"x": "y"}, {"0": [1, "a"]}, [[1]], {"q_proj": {}}, {"q_proj": 2**70}, True)


@pytest.mark.parametrize("case", ["bias-all", "mixtral-one"])
@pytest.mark.parametrize("field", [*FIELDS, "r", "lora_alpha", "peft_type", "use_dora", "lora_dropout", "lora_bias"])
def test_whatever_a_config_says_the_answer_is_an_adapter_or_one_error(case, field, tmp_path):
    base, _, theirs = made(case)
    saved(theirs, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    good = json.loads(path.read_text())
    for value in VALUES:
        path.write_text(json.dumps({**good, field: value}))
        try:
            lk.load(base, tmp_path / "a")
        except lk.LorakitError:
            assert not lk.adapters(base)
        else:
            lk.detach(base)
