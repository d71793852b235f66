"""PEFT as an oracle: the same factors give the same outputs and gradients, and files go both ways."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from helpers import attached, randomize, refused
from models import mlp
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

# Their own, of each other and of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=32)
    )


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, (3, 2), stride=2, padding=1), nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.Tanh())


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(31, 6, padding_idx=0), nn.Linear(6, 4))


MODELS = {
    "gpt2": (gpt2, ["c_attn", "c_proj", "wte"]),
    "conv": (conv, ["0", "2"]),
    "conv-2d": (conv, ["0"]),
    "words": (words, ["0", "1"]),
    "mlp": (mlp, ["0", "2"]),
    "llama": (llama, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    "neox": (neox, ["query_key_value", "dense", "dense_h_to_4h"]),
    "bert": (bert, ["query", "value"]),
}
SPECS = {
    "standard": lk.LoRA(rank=2, alpha=5),
    "rslora": lk.LoRA(rank=3, alpha=4, scaling="rslora"),
    "gaussian": lk.LoRA(rank=2, init="gaussian"),
    "dora": lk.DoRA(rank=2, alpha=3),
    "loha": lk.LoHa(rank=2, alpha=3),
    "lokr": lk.LoKr(rank=1, alpha=2),
    "lokr-both": lk.LoKr(rank=1, factor=3, decompose_both=True),
    "vera": lk.VeRA(rank=3, seed=7),
    "adalora": lk.AdaLoRA(rank=2, alpha=3),
}
THEIRS = {
    "dora": ["mlp", "llama", "gpt2", "conv", "words", "bert"],
    "loha": ["mlp", "llama", "conv-2d", "bert"],
    "lokr": ["mlp", "llama", "conv-2d", "bert"],
    "lokr-both": ["mlp", "llama", "conv-2d"],
    "vera": ["mlp", "llama", "bert"],
    "adalora": ["mlp", "llama", "bert"],
}
"""What PEFT has each method for, and computes rightly; LoRA for all."""
PAIRS = [(kind, spec) for spec in SPECS for kind in THEIRS.get(spec, [name for name in MODELS if name != "conv-2d"])]
over_peers = pytest.mark.parametrize(
    ("kind", "spec"), [pytest.param(kind, SPECS[spec], id=f"{kind}-{spec}") for kind, spec in PAIRS]
)


def build(kind: str) -> tuple[nn.Module, torch.Tensor, list[str]]:
    """A model of random weights, an input for it, and the layers to adapt."""
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    if kind.startswith("conv"):
        return model, torch.randn(3, 1, 2, 6), targets
    return model, torch.randn(3, 6) if kind == "mlp" else torch.randint(1, 31, (2, 5)), targets


def out(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output[0]


CONFIGS = {
    "LORA": peft.LoraConfig,
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
    "VERA": peft.VeraConfig,
    "ADALORA": peft.AdaLoraConfig,
}


def by_peft(base: nn.Module, targets, spec: Any = None, **more):
    """A PEFT model on a copy of the base, with noise in what it trains."""
    fields = {**(spec or lk.LoRA(rank=3)).peft_fields(), **more}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it is then set to True
        warnings.filterwarnings("ignore", "Note that `r` is not used in AdaLora")
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")
        config = CONFIGS[fields.pop("peft_type")](target_modules=targets, **fields)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("base_layer"):
            # It begins at zero and gets no gradient, but PEFT's DoRA counts it in its norms.
            model.get_submodule(name.rpartition(".")[0]).lora_embedding_A["default"].data[:, module.padding_idx] = 0
    return model


def live_key(key: str) -> str:
    """The name that a tensor of PEFT's files has in a PEFT model."""
    key = key + ".weight" if key.endswith("magnitude_vector") else key
    return key.replace(".weight", ".default.weight") if key.endswith(".weight") else f"{key}.default"


def assert_near(got: torch.Tensor, wanted: torch.Tensor, limit: float = 5e-6) -> None:
    assert (got - wanted).abs().max().item() <= limit * max(1.0, wanted.abs().max().item())


@over_peers
def test_the_same_factors_give_peft_s_outputs_and_gradients(kind, spec):
    base, x, targets = build(kind)
    theirs = by_peft(base, targets, spec)
    lk.attach(base, spec, targets)
    pairs = []
    for key, ours in lk.adapter_state_dict(base).items():
        peer = theirs.get_parameter(live_key(key))
        assert peer.shape == ours.shape
        with torch.no_grad():
            ours.copy_(peer)
        pairs.append(peer)
    assert len(pairs) == sum(parameter.requires_grad for parameter in theirs.parameters())
    y, wanted = out(base, x), out(theirs, x)
    assert_near(y, wanted)
    y.square().mean().backward()
    wanted.square().mean().backward()
    for ours, peer in zip(lk.adapter_parameters(base), pairs, strict=True):
        assert_near(ours.grad, peer.grad)


@over_peers
def test_peft_loads_what_is_saved_here(kind, spec, tmp_path):
    base, x, targets = build(kind)
    model = copy.deepcopy(base)
    lk.attach(model, spec, targets)
    randomize(model)
    if kind == "words":
        lk.adapter_parameters(model)[0].data[:, 0] = 0  # the padding, as above
    lk.save(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A and vera_B")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_near(out(theirs, x), out(model, x))
    report = theirs.get_model_status()
    assert report.num_adapter_layers == len(lk.adapters(model)["default"].weights)


@over_peers
def test_what_peft_saves_is_loaded_here(kind, spec, tmp_path):
    base, x, targets = build(kind)
    theirs = by_peft(base, targets, spec)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    lk.load(base, tmp_path / "adapter")
    assert_near(out(base, x), out(theirs, x))
    (adapter,) = lk.adapters(base).values()
    assert adapter.variant.rank == spec.rank
    assert getattr(adapter.variant, "scale", 1) == pytest.approx(getattr(spec, "scale", 1))
    assert all(row.train == row.eval == "effective" for row in lk.probe(base, x).weights)


def test_an_adapter_goes_there_and_back(tmp_path):
    base, x, _ = build("mlp")
    model = attached(copy.deepcopy(base), SPECS["rslora"])
    lk.save(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).save_pretrained(str(tmp_path / "peft"))
    lk.load(base, tmp_path / "peft")
    assert torch.equal(base(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_half_precision_acts_as_it_does_in_peft(dtype, tmp_path):
    base, x, targets = build("mlp")
    by_peft(base, targets).to(dtype).save_pretrained(str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    lk.load(base, tmp_path / "adapter")
    assert_near(base(x), theirs(x))


def test_merging_gives_peft_s_weights():
    base, _, targets = build("mlp")
    theirs = by_peft(base, targets, SPECS["standard"])
    lk.attach(base, SPECS["standard"])
    for key, ours in lk.adapter_state_dict(base).items():
        ours.copy_(theirs.get_parameter(key.replace(".weight", ".default.weight")).detach())
    lk.merge(base)
    plain = theirs.merge_and_unload()
    for name, weight in plain.state_dict().items():
        assert_near(base.state_dict()[name], weight)


UNREAD = {
    "target-parameters": {"target_modules": [], "target_parameters": ["0.weight"]},
}


@pytest.mark.parametrize("feature", UNREAD)
def test_what_cannot_be_read_is_refused_by_its_field(feature, tmp_path):
    base, _, targets = build("mlp")
    arguments = {"target_modules": targets, "r": 2, **UNREAD[feature]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments)).save_pretrained(str(tmp_path / "a"))
    with refused(base, list(UNREAD[feature])[-1]):
        lk.load(base, tmp_path / "a")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_refused_or_acts_as_in_peft(init, tmp_path):
    base, x, targets = build("mlp")
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=init)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    wanted = theirs(x)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    try:
        lk.load(base, tmp_path / "adapter")
    except lk.LorakitError as error:
        assert "init_lora_weights" in str(error)
        return
    assert_near(base(x), wanted, 1e-5)


def test_other_methods_and_other_layers_are_refused(tmp_path):
    base, _, _ = build("mlp")
    ia3 = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"])
    peft.get_peft_model(copy.deepcopy(base), ia3).save_pretrained(str(tmp_path / "ia3"))
    with refused(base, "IA3"):
        lk.load(base, tmp_path / "ia3")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    config = peft.LoraConfig(r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.get_peft_model(copy.deepcopy(grouped), config)
    theirs.save_pretrained(str(tmp_path / "grouped"))
    with refused(grouped, "(2, 4, 3, 3)"):  # a kernel across groups, which a grouped convolution cannot hold
        lk.load(grouped, tmp_path / "grouped")


WRONG_THERE = {
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "reflect": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5)),
    "dilated-same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("case", WRONG_THERE)
def test_convolutions_are_right_where_peft_is_not(case, tmp_path):
    make, size = WRONG_THERE[case]
    torch.manual_seed(0)
    base, x = nn.Sequential(make()), torch.randn(size)
    theirs = by_peft(base, ["0"])
    theirs.save_pretrained(str(tmp_path / "adapter"))
    lk.load(base, tmp_path / "adapter")
    layer = base[0]
    A, B = (factor.flatten(1) for factor in lk.adapter_parameters(base))
    scale = next(iter(lk.adapters(base).values())).variant.scale
    wanted = layer._conv_forward(x, layer.weight + scale * (B @ A).view_as(layer.weight), layer.bias)
    assert_near(base(x), wanted, 1e-5)
    assert (theirs(x) - wanted).abs().max() > 0.1


def test_dropout_in_peft_s_config_does_not_touch_look_ups(tmp_path):
    base, x, targets = build("words")
    theirs = by_peft(base, targets, lora_dropout=0.5)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    lk.load(base, tmp_path / "adapter")
    assert_near(out(base.eval(), x), out(theirs, x))
    with refused(nn.Sequential(nn.Embedding(3, 2)), "Embedding", "dropout=0.5"):
        model = nn.Sequential(nn.Embedding(3, 2))
        lk.attach(model, lk.LoRA(rank=1, dropout=0.5), nn.Embedding)


def test_a_config_without_a_scale_is_refused(tmp_path):
    base, _, targets = build("mlp")
    by_peft(base, targets).save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, word in [({"lora_alpha": "?"}, "alpha"), ({"r": 0}, "rank"), ({"r": 5}, "(5, 6)")]:
        path.write_text(json.dumps({**config, **change}))
        with refused(base, word):
            lk.load(base, path.parent)
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with refused(base, "lora_alpha"):
        lk.load(base, path.parent)
