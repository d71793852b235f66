"""Layers of several weights, adapted as a whole or in part: attention, recurrent layers, transformer layers."""

import copy
import math

import pytest
import torch
from helpers import REGIMES, assert_close, assert_same, attached, picture, randomize, refused
from models import CrossAttention, PaddedEncoder, SelfAttention, decoder, encoder, projected_lstm, sentences
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def plain_attention(layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, update: dict[str, Tensor]) -> Tensor:
    """Attention from its definition (Vaswani et al. 2017, §3.2), with an update for each of its matrices."""
    packed = layer._parameters["in_proj_weight"]
    weights = [layer._parameters[name] for name in PROJECTIONS] if packed is None else packed.chunk(3)
    heads = []
    for x, weight, bias, name in zip((q, k, v), weights, layer.in_proj_bias.chunk(3), PROJECTIONS, strict=True):
        y = F.linear(x, weight + update.get(name, 0.0), bias)
        heads.append(y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))
    q, k, v = heads
    y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    out = layer.out_proj._parameters["weight"].detach() + update.get("out_proj", 0.0)
    return F.linear(y.transpose(1, 2).flatten(2), out, layer.out_proj.bias)


def check_in_every_regime(model: nn.Module, inputs: tuple[Tensor, ...], wanted: Tensor) -> None:
    for regime in REGIMES:
        with torch.set_grad_enabled(regime != "inference"):
            assert_close(model.train(regime == "train")(*inputs).detach(), wanted)


OF_SLICES = {
    "whole": ("attention", PROJECTIONS),
    "type": (nn.MultiheadAttention, PROJECTIONS),
    "query": ("attention.q_proj_weight", PROJECTIONS[:1]),
    "query-value": (["v_proj_weight", "*.q_proj_weight"], (PROJECTIONS[0], PROJECTIONS[2])),
}


@pytest.mark.parametrize("choice", OF_SLICES)
def test_slices_of_attention_are_those_of_its_definition(choice):
    targets, names = OF_SLICES[choice]
    torch.manual_seed(0)
    model, x = SelfAttention().requires_grad_(False), torch.randn(2, 3, 8)
    report = attached(model, lk.LoRA(rank=2, alpha=3), targets=targets)
    factors = dict(report.named_parameters())
    A, B = (factors[f"attention.lora.in_proj_weight.default.{tensor}"].detach() for tensor in "AB")
    assert A.shape == (len(names), 2, 8)
    assert B.shape == (len(names), 8, 2)
    update = {name: 1.5 * b @ a for name, a, b in zip(names, A, B, strict=True)}
    if len(names) == 3:
        a, b = (factors[f"attention.out_proj.lora.weight.default.{tensor}"].detach() for tensor in "AB")
        update["out_proj"] = 1.5 * b @ a
    check_in_every_regime(model, (x,), plain_attention(model.attention, x, x, x, update).detach())


def test_attention_of_three_sizes_is_that_of_its_definition():
    torch.manual_seed(0)
    model = CrossAttention().requires_grad_(False)
    inputs = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    attached(model, lk.LoRA(rank=2), targets="attention")
    factors = {key: value.detach() for key, value in model.named_parameters()}
    update = {}
    for name in (*PROJECTIONS, "out_proj"):
        path = "out_proj.lora.weight" if name == "out_proj" else f"lora.{name}"
        A, B = (factors[f"attention.{path}.default.{tensor}"] for tensor in "AB")
        update[name] = B @ A
    assert [update[name].shape[1] for name in PROJECTIONS] == [8, 6, 5]
    check_in_every_regime(model, inputs, plain_attention(model.attention, *inputs, update).detach())


def test_every_matrix_of_a_recurrent_layer_is_adapted():
    torch.manual_seed(0)
    model, x = projected_lstm(), torch.randn(4, 2, 4)
    other = copy.deepcopy(model)
    attached(model, targets=nn.LSTM)
    matrices = [name for name, parameter in other.named_parameters() if parameter.dim() == 2]
    assert len(matrices) == 12
    assert list(lk.adapters(model)["default"].weights) == matrices
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in matrices:
            A, B = (parameters[f"lora.{name}.default.{tensor}"] for tensor in "AB")
            other.get_parameter(name).add_(B @ A)
        check_in_every_regime(nn.Sequential(model, First()), (x,), other(x)[0])


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


MATRICES = {
    "rnn": (nn.RNN(3, 4, num_layers=2), 4),
    "gru": (nn.GRU(3, 4, bidirectional=True), 4),
    "lstm": (nn.LSTM(3, 4, proj_size=2), 3),
    "rnn-cell": (nn.RNNCell(3, 4), 2),
    "lstm-cell": (nn.LSTMCell(3, 4), 2),
    "gru-cell": (nn.GRUCell(3, 4), 2),
}


@pytest.mark.parametrize("layer", MATRICES)
def test_naming_a_layer_names_its_matrices_and_naming_one_names_that_one(layer):
    inner, count = MATRICES[layer]
    model = nn.ModuleDict({"layer": copy.deepcopy(inner)})
    plan = lk.plan(model, lk.LoRA(rank=2), "layer")
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    assert [row.layer for row in plan.rows] == matrices
    assert len(matrices) == count
    for name in matrices:
        assert [row.layer for row in lk.plan(model, lk.LoRA(rank=2), name).rows] == [name]
    rest = lk.plan(model, lk.LoRA(rank=2), "layer", exclude=matrices[0])
    assert [row.layer for row in rest.rows] == matrices[1:]


def shapes(model: nn.Module, targets, **how) -> dict[str, tuple[int, ...]]:
    return {row.layer: row.tensors["A"] for row in lk.plan(model, lk.LoRA(rank=2), targets, **how).rows}


def test_what_a_name_means_for_packed_attention():
    model = SelfAttention()
    packed, out = "attention.in_proj_weight", "attention.out_proj.weight"
    assert shapes(model, "attention") == {packed: (3, 2, 8), out: (2, 8)}
    assert shapes(model, packed) == {packed: (2, 8)}
    assert shapes(model, "k_proj_weight") == {packed: (1, 2, 8)}
    assert shapes(model, ["k_proj_weight", "attention"]) == {packed: (3, 2, 8), out: (2, 8)}
    assert shapes(model, "attention", exclude="k_proj_weight") == {packed: (2, 2, 8), out: (2, 8)}
    assert shapes(model, "attention", exclude=list(PROJECTIONS)) == {out: (2, 8)}
    assert shapes(model, "attention", exclude="out_proj") == {packed: (3, 2, 8)}
    assert shapes(model, "attention", exclude="in_proj_weight") == {out: (2, 8)}
    assert shapes(model, "all-linear") == {out: (2, 8)}
    assert "q_proj_weight, v_proj_weight" in str(lk.plan(model, lk.LoRA(rank=2), ["q_proj_weight", "v_proj_weight"]))


REFUSED = {
    "twice": (["in_proj_weight", "q_proj_weight"], {}, "'attention.in_proj_weight'", "by its slices"),
    "part-of-one-update": ("in_proj_weight", {"exclude": "q_proj_weight"}, "q_proj_weight", "name the slices"),
    "misspelt-slice": ("attention.q_prj_weight", {}, "'attention.q_proj_weight'"),
    "beside": ("attention", {"mode": "beside"}, "read, not called"),
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_cannot_be_meant_is_refused(error):
    targets, how, *words = REFUSED[error]
    model = SelfAttention()
    with refused(model, *words):
        lk.attach(model, lk.LoRA(rank=2), targets, **how)


def test_a_rank_above_that_of_a_slice_is_refused():
    model = SelfAttention()
    with refused(model, "'attention.in_proj_weight'", "rank 9", "3 slices of 8×8", "at most 8"):
        lk.attach(model, lk.LoRA(rank=9), "attention")
    with refused(model, "rank 9"):
        lk.attach(model, lk.LoRA(rank=9), "q_proj_weight")


def test_adapters_of_several_parts_of_one_parameter_add_up(tmp_path):
    torch.manual_seed(0)
    model, x = SelfAttention(), torch.randn(2, 3, 8)
    plain, before = copy.deepcopy(model), picture(model)
    kinds = {"packed": "in_proj_weight", "all": "attention", "q": "q_proj_weight", "kv": ["k_proj_weight", "*.v_*"]}
    delta = {}
    for i, (name, targets) in enumerate(kinds.items()):
        lk.attach(model, lk.LoRA(rank=2), targets, name=name, exclude="out_proj" if name == "all" else None)
        randomize(model, name, seed=i)
        with lk.active(model, name):
            delta[name] = (model.attention.in_proj_weight - plain.attention.in_proj_weight).detach()
        lk.save(model, tmp_path / name, name)
    lk.activate(model, {"packed": 0.5, "all": 2.0, "q": 1.0, "kv": -1.0})
    total = 0.5 * delta["packed"] + 2 * delta["all"] + delta["q"] - delta["kv"]
    assert not delta["q"][8:].any()
    assert not delta["kv"][:8].any()
    assert_close(model.attention.in_proj_weight, plain.attention.in_proj_weight + total)
    y = model(x)
    with lk.merged(model):
        assert_close(model(x), y)
    for name in kinds:
        fresh = copy.deepcopy(plain)
        lk.load(fresh, tmp_path / name)
        with torch.no_grad(), lk.active(model, name):  # with gradients torch's kernel depends on what is trained
            assert torch.equal(fresh(x), model(x))
    lk.remove(model, "all")
    lk.detach(model)
    assert_same(picture(model), before)


def test_slices_that_a_file_names_must_be_there(tmp_path):
    model = attached(SelfAttention(), targets="q_proj_weight")
    lk.save(model, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(content.replace(b"q_proj_weight", b"x_proj_weight"))
    other = SelfAttention()
    with refused(other, "'attention.in_proj_weight' has no slices x_proj_weight"):
        lk.load(other, tmp_path / "b.safetensors", verify="off")


def modes(model: nn.Module, targets, **how) -> dict[str, str]:
    rows = lk.plan(model, lk.LoRA(rank=2), targets, **how).rows
    return {row.layer.removesuffix(".weight"): row.applied for row in rows}


def test_what_a_transformer_layer_reads_is_adapted_in_the_weight():
    feed_forward = ["linear1", "linear2"]
    assert set(modes(encoder(), feed_forward).values()) == {"in the weight"}
    assert set(modes(encoder(), feed_forward, mode="beside").values()) == {"beside"}
    assert list(modes(encoder(), nn.TransformerEncoderLayer)) == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    found = modes(decoder(), nn.TransformerDecoderLayer)
    assert len(found) == 6
    assert {name for name, applied in found.items() if applied == "beside"} == {
        "layers.0.linear1",
        "layers.0.linear2",
    }


@pytest.mark.parametrize("targets", ["all-linear", ["linear1", "linear2"], "linear2", nn.TransformerEncoderLayer])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_padded_encoder_in_eval(targets, grad, trained):
    torch.manual_seed(0)
    model, inputs = PaddedEncoder().eval(), sentences()
    attached(model, targets=targets)
    lk.set_trainable(model, "default", trained)
    with torch.set_grad_enabled(grad):
        y = model(*inputs)
        with lk.merged(model):
            wanted = model(*inputs)
    assert_close(y, wanted)
    with torch.no_grad(), lk.disabled(model):
        assert not torch.equal(y, model(*inputs))


def test_a_part_that_cannot_be_adapted_is_not_passed_over():
    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = encoder()
    model.self_attn = OwnAttention()
    with refused(model, "OwnAttention", "'self_attn'", "'self_attn.weight'"):
        lk.attach(model, lk.LoRA(rank=2), nn.TransformerEncoderLayer)
    assert list(modes(model, nn.TransformerEncoderLayer, exclude="self_attn")) == ["linear1", "linear2"]
    model.linear1 = nn.Identity()
    assert list(modes(model, nn.TransformerEncoderLayer, exclude="self_attn")) == ["linear2"]


NORMS = {"layer-norm": nn.LayerNorm(4), "batch-norm": nn.BatchNorm1d(4), "group-norm": nn.GroupNorm(2, 4)}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_is_refused_with_its_reason_and_what_works(norm):
    model = nn.ModuleDict({"norm": NORMS[norm], "up": nn.Linear(4, 4)})
    for targets in ("norm", "*", type(NORMS[norm]), lambda name, module: name in ("up", "norm")):
        with refused(model, type(NORMS[norm]).__name__, "'norm'", "(4,)", "a vector has no low-rank", "'up'"):
            lk.attach(model, lk.LoRA(rank=2), targets)
    assert list(modes(model, "*", exclude="norm")) == ["up"]
