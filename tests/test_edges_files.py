"""What was once silently wrong, or an error that no one could read."""

import copy
import json
import re
import warnings

import pytest
import torch
from helpers import assert_close, assert_same, attached, picture, refused
from torch import Tensor, nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
IDS = torch.tensor([[1, 7, 2, 9], [8, 3, 8, 4]])


def llama(**more) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **more)).eval()


def nested() -> nn.Module:
    """The name of its first layer is the end of another's."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9)), nn.Linear(9, 5))


@torch.no_grad()
def trained_by_peft(base: nn.Module, config) -> nn.Module:
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def read_by_peft(base: nn.Module, path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()


FIRST = re.compile("^0$")
ALIKE = {
    "alphas": (lk.LoRA(rank=2), {"targets": "all-linear", "alphas": {FIRST: 5}}),
    "dora-alphas": (lk.DoRA(rank=2), {"targets": "all-linear", "alphas": {FIRST: 5}}),
    "loha-alphas": (lk.LoHa(rank=2), {"targets": "all-linear", "alphas": {FIRST: 5}}),
    "ranks": (lk.LoRA(rank=2), {"targets": "all-linear", "ranks": {FIRST: 3}}),
    "lokr-ranks": (lk.LoKr(rank=1, decompose_both=True), {"targets": "all-linear", "ranks": {FIRST: 3}}),
    "vera": (lk.VeRA(rank=3), {"targets": FIRST}),
    "whole": (lk.LoRA(rank=2), {"targets": "1.0", "train_also": re.compile("^2$")}),
}


@pytest.mark.parametrize("case", ALIKE)
def test_peft_tells_a_layer_from_one_whose_name_ends_alike(case, tmp_path):
    base, x = nested(), torch.randn(3, 6)
    variant, how = ALIKE[case]
    model = attached(copy.deepcopy(base), variant, **how)
    lk.save(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A and vera_B")
        assert_close(read_by_peft(base, tmp_path / "a")(x), model(x))
    again = copy.deepcopy(base)
    lk.load(again, tmp_path / "a")
    assert_close(again(x), model(x))


def test_peft_is_not_led_to_a_layer_it_cannot_adapt(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))), torch.randn(3, 6)
    model = attached(copy.deepcopy(base), targets=FIRST)
    lk.save(model, tmp_path / "a")
    assert_close(read_by_peft(base, tmp_path / "a")(x), model(x))


def test_a_norm_whose_name_is_the_end_of_other_norms_is_read_by_peft(tmp_path):
    base = llama().model
    model = attached(copy.deepcopy(base), targets="q_proj", train_also="norm")
    lk.save(model, tmp_path / "a")
    assert_close(read_by_peft(base, tmp_path / "a")(IDS)[0], model(IDS)[0])


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.shift)


def test_a_parameter_of_a_module_that_holds_layers_is_read_by_peft(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6), Shifted()), torch.randn(3, 6)
    model = attached(copy.deepcopy(base), targets=FIRST, train_also="1.shift")
    lk.save(model, tmp_path / "a")
    assert_close(read_by_peft(base, tmp_path / "a")(x), model(x))


BEYOND = {
    "weights-by-name": ({"targets": ["2.weight", "1.0.weight"]}, lk.LoRA(rank=1), None),
    "bias-of-an-adapted-layer": ({"targets": "0", "train_also": "0.bias"}, lk.LoRA(rank=1), None),
    "rows-beside-loha": ({"targets": "0", "train_rows": {"2": [1]}}, lk.LoHa(rank=1), "beside LOHA"),
    "own-rank-of-adalora": ({"ranks": {"0": 2}}, lk.AdaLoRA(rank=1), "of its own"),
    "sizes": ({}, lk.VeRA(rank=2, sizes=(50, 50)), "sizes=(50, 50)"),
    "whole-alone": ({"targets": "0"}, lk.Full(), "no layer has"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_peft_would_lose_a_part_of_it_refuses(case, tmp_path):
    how, variant, reason = BEYOND[case]
    base, x = nested(), torch.randn(2, 6)
    model = attached(copy.deepcopy(base), variant, **how)
    lk.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if reason is None:  # PEFT has the layer whose own weight was named, and a bias under the layer it wraps
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
        assert_close(theirs(x), model(x))
    else:
        assert reason in config["reasons"][0]
        with pytest.raises(Exception, match="LORAKIT"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    lk.load(base, tmp_path / "a")
    assert torch.equal(base(x), model(x))


def test_rows_of_one_of_two_tied_weights_are_not_read_into_both(tmp_path):
    base = llama(tie_word_embeddings=True)
    model = attached(copy.deepcopy(base), targets="q_proj", train_rows={"embed_tokens": [7]})
    lk.save(model, tmp_path / "a")
    with pytest.raises(Exception, match="LORAKIT"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    lk.load(base, tmp_path / "a")
    assert torch.equal(base(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("indices", [{"embed_tokens": [7, 8]}, [7, 8], {"embed_tokens": [7, 8], "lm_head": [7, 9]}])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tied_embeddings_that_peft_trained(tied, indices, tmp_path):
    base = llama(tie_word_embeddings=tied)
    theirs = trained_by_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices))
    theirs.save_pretrained(str(tmp_path / "a"))
    model = copy.deepcopy(base)
    lk.load(model, tmp_path / "a")
    assert_close(model(IDS)[0], theirs(IDS)[0])
    lk.save(model, tmp_path / "b")
    assert_close(read_by_peft(base, tmp_path / "b")(IDS)[0], model(IDS)[0])


def test_vera_with_its_projection_and_biases_or_modules_is_read(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 6)
    config = peft.VeraConfig(r=3, target_modules=["0"], bias="vera_only", modules_to_save=["2"], save_projection=True)
    theirs = trained_by_peft(base, config)
    theirs.save_pretrained(str(tmp_path / "a"))
    lk.load(base, tmp_path / "a")
    assert_close(base(x), theirs(x))


class Twice(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a if shared else copy.deepcopy(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_two_updates_for_what_is_one_weight_here_are_refused(tmp_path):
    model, shared = Twice(False), Twice(True)
    shared.load_state_dict(model.state_dict())
    lk.save(attached(model), tmp_path / "a")
    with refused(shared, "'a.weight'", "'b.weight'", "one and the same"):
        lk.load(shared, tmp_path / "a")


def test_a_directory_of_peft_is_named_by_its_place(tmp_path, monkeypatch):
    base = nested()
    trained_by_peft(base, peft.LoraConfig(r=2, target_modules=["1.0"])).save_pretrained(str(tmp_path / "mine"))
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    monkeypatch.chdir(tmp_path / "mine")
    assert lk.load(base, ".").name == "mine"


class Rescaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, max_norm=0.1)
        self.body = nn.Linear(4, 3)
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.body(self.embed(x))


def test_probe_leaves_weights_that_torch_rescales_and_buffers_that_were_none():
    model, x = Rescaling(), torch.tensor([0, 1])
    before = picture(model)
    lk.attach(model, lk.LoRA(rank=2), "body", example=x)
    assert lk.probe(model, x).ok
    lk.detach(model)
    assert_same(picture(model), before)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, model: Tensor, name: Tensor) -> Tensor:
        return self.body(model + name)


def test_an_example_whose_arguments_are_called_as_those_of_probe():
    model = Named()
    lk.attach(model, lk.LoRA(rank=2), "body", example={"model": torch.randn(2, 4), "name": torch.randn(4)})
    assert lk.adapters(model)["default"].weights == ("body.weight",)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.flat(x.reshape(-1, 4)).reshape(x.shape))


def test_a_layer_that_no_row_has_an_adapter_for_may_see_another_batch():
    model, x = Flat(), torch.randn(3, 2, 4)
    for layer in ("flat", "body"):
        attached(model, targets=layer, name=layer)
    with lk.active(model, "body"):
        y = model(x)
    with lk.disabled(model):
        base = model(x)
    with lk.per_row(model, ["body", None, "body"]):
        assert_close(model(x), torch.stack([y[0], base[1], y[2]]))
    with lk.per_row(model, ["flat", None, "body"]), pytest.raises(lk.LorakitError, match="3 rows"):
        model(x)


def test_a_scripted_module_cannot_be_trained_as_a_whole():
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 3))
    before = [(key, value.clone()) for key, value in model.state_dict().items()]
    with pytest.raises(lk.LorakitError, match="scripted"):
        lk.attach(model, lk.LoRA(rank=1), "1", train_also="0")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before)


@pytest.mark.parametrize(
    ("rows", "word"), [({"0": 3}, "no list"), ({"0": [1], "*": [2]}, "twice"), ({"0": [1], "0.weight": [2]}, "twice")]
)
def test_rows_that_would_be_lost_are_refused(rows, word):
    model = nn.Sequential(nn.Embedding(5, 4))
    with refused(model, word):
        lk.attach(model, lk.LoRA(rank=1), "0", train_rows=rows)


def test_shared_matrices_of_absurd_sizes_are_refused_before_they_are_drawn():
    with pytest.raises(lk.LorakitError, match="sizes"):
        lk.VeRA(rank=1, sizes=(4, 2**31))
