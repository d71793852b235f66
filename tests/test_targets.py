"""Which weights `targets` and `exclude` choose, what `plan` says of them, and what is refused (law 10)."""

import re

import pytest
import torch
from helpers import assert_same, picture, refused
from kinds import CASES, Case
from models import Reader, Tied, mlp
from torch import nn

import lorakit as lk

LORA = lk.LoRA(rank=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.norm(self.o_proj((q @ k.mT).softmax(-1) @ v))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.mlp(self.attention(x))


class Decoder(nn.Module):
    """Many patterns' worth of names: layers.<i>.attention.<q,k,v,o>_proj, layers.<i>.mlp.<0,2>, gate, fused, head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.fused = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.fused(x, x, x)[0] @ self.gate)


def chosen(targets, **rest) -> list[str]:
    return [row.layer for row in lk.plan(Decoder(), LORA, targets, **rest).rows]


def every(*tails: str) -> list[str]:
    return [f"layers.{i}.{tail}" for i in range(2) for tail in tails]


PROJECTIONS = [f"attention.{p}_proj" for p in "qkvo"]
ALL_LINEAR = [*every(*PROJECTIONS, "mlp.0", "mlp.2"), "fused.out_proj.weight", "head"]
SELECTIONS = {
    "all-linear": ("all-linear", ALL_LINEAR),
    "whole-name": ("layers.1.attention.q_proj", ["layers.1.attention.q_proj"]),
    "last-part": ("q_proj", every("attention.q_proj")),
    "last-parts": ("attention.v_proj", every("attention.v_proj")),
    "list": (["v_proj", "q_proj"], every("attention.q_proj", "attention.v_proj")),
    "tuple": (("head", "0.attention.q_proj"), ["layers.0.attention.q_proj", "head"]),
    "overlapping": (["q_proj", "*.q_proj", re.compile("q_")], every("attention.q_proj")),
    "glob": ("layers.0.*_proj", [f"layers.0.attention.{p}_proj" for p in "qkvo"]),
    "glob-question-mark": ("*.attention.?_proj", every(*PROJECTIONS)),
    "glob-set": ("*.[qv]_proj", every("attention.q_proj", "attention.v_proj")),
    "regex-is-searched": (re.compile(r"\.(k|o)_proj$"), every("attention.k_proj", "attention.o_proj")),
    "regex-over-activations": (re.compile(r"mlp\.\d"), every("mlp.0", "mlp.2")),
    "type": (nn.Linear, ALL_LINEAR),
    "function": (lambda name, module: getattr(module, "out_features", 0) == 16, every("mlp.0")),
    "function-of-name": (lambda name, module: name.endswith("mlp.2"), every("mlp.2")),
    "parameter": ("gate", ["gate"]),
    "parameter-of-a-layer": ("head.weight", ["head.weight"]),
    "parameters-by-last-part": ("in_proj_weight", ["fused.in_proj_weight"]),
    "parameters-by-glob": ("*.q_proj.weight", every("attention.q_proj.weight")),
    "parameters-by-regex": (re.compile(r"^(gate|fused\.in_proj_weight)$"), ["gate", "fused.in_proj_weight"]),
    "layer-and-parameter": (["head", "gate"], ["gate", "head"]),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_sort_of_pattern_selects_in_the_models_order(selection):
    targets, names = SELECTIONS[selection]
    assert chosen(targets) == names


EXCLUSIONS = {
    "name": ("head", [n for n in ALL_LINEAR if n != "head"]),
    "subtree": ("layers", ["fused.out_proj.weight", "head"]),
    "one-of-a-list": ("layers.0", [n for n in ALL_LINEAR if not n.startswith("layers.0")]),
    "glob": ("*_proj", [*every("mlp.0", "mlp.2"), "head"]),
    "regex": (re.compile("mlp|fused|head"), every(*PROJECTIONS)),
    "type": (Attention, [*every("mlp.0", "mlp.2"), "fused.out_proj.weight", "head"]),
    "function": (lambda name, module: "attention" in name, [n for n in ALL_LINEAR if "attention" not in n]),
    "parameter": ("head.weight", [n for n in ALL_LINEAR if n != "head"]),
    "list": (["layers", "head"], ["fused.out_proj.weight"]),
}


@pytest.mark.parametrize("exclusion", EXCLUSIONS)
def test_each_sort_of_pattern_excludes_with_all_below(exclusion):
    exclude, names = EXCLUSIONS[exclusion]
    assert chosen("all-linear", exclude=exclude) == names


ERRORS = {
    "misspelt": ("q_prj", "'q_prj'", "'q_proj'"),
    "misspelt-of-several": (["q_proj", "v_prj"], "'v_prj'", "'v_proj'"),
    "misspelt-whole": ("layers.0.atention.q_proj", "'layers.0.attention.q_proj'"),
    "misspelt-parameter": ("in_proj_wieght", "'in_proj_weight'"),
    "far-from-all": ("zzz", "'zzz'", "'layers.0.attention.q_proj'"),
    "glob": ("*.w_proj", "'*.w_proj'"),
    "regex": (re.compile("^q_proj"), "'^q_proj'"),
    "type": (nn.Conv2d, "Conv2d"),
    "function": (lambda name, module: False, "matches nothing"),
    "container": ("mlp", "Sequential", "layers.0.mlp", "'layers.0.mlp.0'"),
    "list-container": ("layers", "ModuleList", "layers"),
    "own-module": ("attention", "Attention", "layers.0.attention"),
    "norm": ("norm", "LayerNorm", "layers.0.attention.norm", "two axes"),
    "activation": ("mlp.1", "GELU", "layers.0.mlp.1", "no weight"),
    "bias": ("head.bias", "'head.bias'"),
    "one-axis": ("q_proj.bias", "q_proj.bias", "(8,)"),
    "empty": ([], "empty"),
    "empty-text": ("", "''"),
    "number": (3, "3"),
    "none": ([None], "None"),
    "twice": (["head", "head.weight"], "'head.weight'", "twice"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_target_that_cannot_be_is_refused_and_says_what_could(error):
    targets, *words = ERRORS[error]
    model = Decoder()
    for verb in (lk.attach, lk.plan):
        with refused(model, *words):
            verb(model, LORA, targets)


def test_an_exclusion_must_match_and_leave_something():
    model = Decoder()
    with refused(model, "'haed'", "'head'"):
        lk.attach(model, LORA, exclude="haed")
    with refused(model, "nothing to adapt"):
        lk.attach(model, LORA, "q_proj", exclude="attention")
    with refused(model, "exclude", "empty"):
        lk.attach(model, LORA, exclude=[])


class OwnLora(nn.Linear):
    def __init__(self):
        super().__init__(6, 5)
        self.lora = nn.Identity()


class Owning(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 5))
        self.extra = nn.Parameter(torch.randn(5, 5))


def integers() -> nn.Module:
    model = Reader()
    model.table = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    return model


ODD = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(5)), "0", "'0.weight'", "run the model once"),
    "lazy-all-linear": (lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 4)), "all-linear", "0.weight", "shape"),
    "integers": (integers, "table", "'table'", "int8"),
    "own-lora": (lambda: nn.Sequential(OwnLora()), "0", "'0.weight'", "OwnLora", "'lora'"),
    "owning-sequential": (Owning, "extra", "'extra'", "Owning"),
    "list": (lambda: nn.ParameterList([nn.Parameter(torch.randn(3, 3, 3)[0, 0])]), "0", "(3,)"),
    "empty-weight": (lambda: nn.Sequential(nn.Linear(6, 0)), "0", "'0.weight'", "(0, 6)"),
    "no-linear": (lambda: nn.Sequential(nn.Embedding(3, 4)), "all-linear", "Embedding", "'0.weight'"),
    "nothing": (lambda: nn.Sequential(nn.ReLU()), "all-linear", "no linear layer", "none"),
    "complex": (lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), "0", "complex64"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_weight_that_is_no_matrix_of_numbers_is_refused(odd):
    make, targets, *words = ODD[odd]
    model = make()
    anatomy = picture(model)[0] if "lazy" not in odd else None
    for verb in (lk.attach, lk.plan):
        with pytest.raises(lk.LorakitError) as caught:
            verb(model, LORA, targets)
        assert all(word in str(caught.value) for word in words), caught.value
    assert anatomy is None or picture(model)[0] == anatomy


def test_arguments_of_another_type_are_refused():
    model = mlp()
    for bad in (None, 8, "lora", lk.LoRA):
        with refused(model, "variant"):
            lk.attach(model, bad)
    for bad in (None, mlp, [mlp()]):
        with pytest.raises(lk.LorakitError, match=r"nn\.Module"):
            lk.attach(bad, LORA)
    for bad in ("besides", None, True):
        with refused(model, "mode"):
            lk.attach(model, LORA, mode=bad)


@pytest.mark.parametrize("case", [c for c in CASES if c.mode == "auto"], ids=lambda case: case.name)
def test_the_mode_can_be_forced_where_it_has_a_meaning(case: Case):
    model, _ = case.build()
    read = any(row.applied == "in the weight" for row in lk.plan(model, LORA, **case.how).rows) and not case.either
    weight = lk.plan(model, LORA, case.targets, mode="weight")
    assert {row.applied for row in weight.rows} == {"in the weight"}
    if read:
        with refused(model, "read, not called"):
            lk.attach(model, LORA, case.targets, mode="beside")
    else:
        assert {row.applied for row in lk.plan(model, LORA, case.targets, mode="beside").rows} == {"beside"}


BAD_NAMES = ["", "a.b", ".", "..", "a/b", "a\\b", "a b", "a\n", "\x00", None, 3, b"a"]
TAKEN_NAMES = ["train", "training", "forward", "selection", "_modules", "_parameters", "_forward_hooks"]


@pytest.mark.parametrize("name", BAD_NAMES + TAKEN_NAMES)
def test_a_name_that_cannot_be_a_key_is_refused(name):
    model = mlp()
    for verb in (lk.attach, lk.plan):
        with refused(model, repr(name)):
            verb(model, LORA, name=name)


@pytest.mark.parametrize("name", ["default", "sql-2_b", "weight", "A", "keys", "items", "lora", "é", "0"])
def test_every_other_name_is_a_name(name, tmp_path):
    model = mlp()
    lk.attach(model, LORA, name=name)
    lk.save(model, tmp_path / "adapter")
    lk.detach(model)
    lk.load(model, tmp_path / "adapter")
    assert list(lk.adapters(model)) == [name]


def test_a_second_adapter_of_the_same_name_is_refused():
    model = mlp()
    lk.attach(model, LORA, name="sql")
    for verb in (lk.attach, lk.plan):
        with refused(model, "'sql'", "resident"):
            verb(model, LORA, name="sql")


def test_tied_and_shared_weights_are_named_in_the_plan():
    assert lk.plan(Tied(), LORA, "head").rows[0].note == "tied to embedding.weight"
    layer = nn.Linear(3, 3)
    (row,) = lk.plan(nn.ModuleDict({"a": layer, "b": layer, "c": layer}), LORA).rows
    assert (row.layer, row.note) == ("a", "also b; also c")


def test_a_parameter_of_the_model_itself_can_be_chosen():
    model = Reader()
    before = picture(model)
    assert [row.layer for row in lk.plan(model, LORA, re.compile("^table$")).rows] == ["table"]
    assert_same(picture(model), before)
