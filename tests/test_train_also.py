"""Heads, norms, biases and rows trained beside an adapter: saved with it, switched with it, gone with `disabled`."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close, assert_same, picture, randomize, refused
from torch import Tensor, nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embed(x))).mean(1))


HOW = {"targets": "all-linear", "train_also": ["head", "norm", "body.bias"], "train_rows": {"embed": [7, 8]}}


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Classifier()


X = torch.tensor([[1, 7, 2], [8, 8, 3]])


@torch.no_grad()
def formula(base: nn.Module, model: nn.Module, strength: float = 1.0) -> nn.Module:
    """The base with each weight W + strength·(V − W), and the body's W + strength·B·A."""
    dense, state = copy.deepcopy(base), model.state_dict()
    for name, parameter in dense.named_parameters():
        layer, _, own = name.rpartition(".")
        prefix = f"{layer}.lora.{own}.default."
        if prefix + "A" in state:
            parameter += strength * state[prefix + "B"] @ state[prefix + "A"]
        elif name == "embed.weight":
            parameter[[7, 8]] += strength * (state[prefix + "value"] - parameter[[7, 8]])
        elif prefix + "value" in state:
            parameter += strength * (state[prefix + "value"] - parameter)
    return dense


def test_they_train_switch_save_and_vanish_with_the_adapter(base, tmp_path):
    before, fresh, y = picture(base), copy.deepcopy(base), base(X)
    plain = copy.deepcopy(base)
    plan = lk.attach(base, lk.LoRA(rank=2), **HOW, name="default")
    assert [row.layer for row in plan.rows if "value" in row.tensors] == [
        "embed",
        "head.0.weight",
        "head.0.bias",
        "head.2.weight",
        "head.2.bias",
        "norm.weight",
        "norm.bias",
        "body.bias",
    ]
    assert [row.layer for row in plan.rows if "A" in row.tensors] == ["body"]
    assert torch.equal(base(X), y)
    randomize(base)
    for strength in (1.0, 0.4):
        lk.activate(base, {"default": strength})
        assert_close(base(X), formula(plain, base, strength)(X))
    lk.activate(base, "default")
    adapted = base(X)
    with lk.disabled(base):
        assert torch.equal(base(X), y)
    with lk.merged(base):
        assert_close(base(X), adapted)
    base(X).sum().backward()
    trained = {name for name, p in base.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in base.named_parameters() if ".lora." in name or name.startswith("lora.")}
    for form in ("directory", "file.safetensors"):
        model = copy.deepcopy(fresh)
        lk.save(base, tmp_path / form)
        lk.load(model, tmp_path / form)
        assert torch.equal(model(X), adapted)
        assert lk.adapters(model)["default"].weights == lk.adapters(base)["default"].weights
    lk.attach(base, lk.LoRA(rank=1), "body", name="other")
    assert torch.equal(base(X), y)
    lk.activate(base, "default")
    assert torch.equal(base(X), adapted)
    lk.detach(base)
    assert_same(picture(base), before)


def test_peft_reads_them_and_they_are_read_from_peft(base, tmp_path):
    plain = copy.deepcopy(base)
    how = {"targets": "body", "train_also": ["head.2", "norm"], "train_rows": {"embed": [7, 8]}}
    lk.attach(base, lk.LoRA(rank=2), **how)
    randomize(base)
    y = base(X)
    lk.save(base, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours"))
    assert_close(theirs(X), y)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = copy.deepcopy(plain)
    lk.load(again, tmp_path / "theirs")
    assert_close(again(X), y)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_read(base, bias, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["body", "head.0"], bias=bias)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path / "a"))
    lk.load(base, tmp_path / "a")
    assert_close(base(X), theirs(X))


BAD = {
    "nothing": ({"train_also": "nope"}, "'nope'"),
    "no-parameter": ({"train_also": "head.1"}, "no parameter"),
    "not-a-mapping": ({"train_rows": ["embed"]}, "must map"),
    "row-twice": ({"train_rows": {"embed": [1, 1]}}, "each once"),
    "row-too-large": ({"train_rows": {"embed": [9]}}, "'embed'.*row 9.*9 rows"),
    "row-negative": ({"train_rows": {"embed": [-1]}}, "-1"),
    "both": ({"train_rows": {"embed": [1]}, "train_also": "embed"}, "choose one"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(base, case):
    arguments, word = BAD[case]
    before = picture(base)
    with pytest.raises(lk.LorakitError, match=word):
        lk.attach(base, lk.LoRA(rank=2), **arguments)
    assert_same(picture(base), before)
    padded = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Linear(3, 2))
    with refused(padded, "padding"):
        lk.attach(padded, lk.LoRA(rank=1), train_rows={"0": [2]})
