"""Nothing is silently wrong: cases in which something would be lost, or would act on nothing, without a word."""

import json

import pytest
import torch
from helpers import assert_close, attached, randomize, refused
from models import mlp
from torch import nn

import lorakit as lk

over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])


@over_modes
def test_a_checkpoint_of_the_base_does_not_pass_for_an_adapter_on_meta(mode):
    base = mlp()
    with torch.device("meta"):
        model = mlp()
    lk.attach(model, lk.LoRA(rank=2), mode=mode)
    with pytest.raises(RuntimeError, match="lora"):
        model.load_state_dict(base.state_dict(), assign=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(torch.randn(3, 6))


def test_an_adapter_is_neither_loaded_onto_meta_nor_saved_from_it(tmp_path):
    lk.save(attached(mlp()), tmp_path / "a")
    model = mlp().to("meta")
    with pytest.raises(lk.LorakitError, match="meta"):
        lk.load(model, tmp_path / "a")
    lk.attach(model, lk.LoRA(rank=2))
    with pytest.raises(lk.LorakitError, match="meta"):
        lk.save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_layer_whose_forward_was_replaced_is_adapted_in_the_weight():
    model, x = mlp(), torch.randn(3, 6)
    forward = model[0].forward
    model[0].forward = lambda t: forward(2 * t)
    report = lk.attach(model, lk.LoRA(rank=2))
    assert [row.applied for row in report.rows] == ["in the weight", "beside"]
    randomize(model)
    y = model(x)
    with lk.merged(model):
        assert_close(model(x), y)


def test_merging_no_adapter_is_refused():
    model = attached(mlp())
    for nothing in ([], {}, ()):
        with refused(model, "nothing to merge"):
            lk.merge(model, nothing)
        with refused(model, "nothing to merge"), lk.merged(model, nothing):
            pass


def test_a_replaced_layer_is_missed(tmp_path):
    model, x = attached(mlp()), torch.randn(3, 6)
    model[0] = nn.Linear(6, 5)
    for verb in (
        lambda: lk.save(model, tmp_path / "a"),
        lambda: lk.merge(model),
        lambda: lk.adapter_state_dict(model),
        lambda: lk.probe(model, x),
    ):
        with pytest.raises(lk.LorakitError, match=r"lost '0\.weight'"):
            verb()
    assert not list(tmp_path.iterdir())
    lk.detach(model)
    assert lk.adapters(model) == {}


def test_probing_a_model_that_changes_by_itself_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = nn.Linear(6, 4), 0

        def forward(self, x):
            self.count += 1
            return self.layer(x) + self.count

    model = attached(Counting())
    with pytest.raises(lk.LorakitError, match="nothing can be told"):
        lk.probe(model, torch.randn(3, 6))


@over_modes
def test_what_was_attached_or_loaded_in_inference_mode_can_be_trained(mode, tmp_path):
    lk.save(attached(mlp(), mode=mode), tmp_path / "a")
    model, x = mlp(), torch.randn(3, 6)
    with torch.inference_mode():
        lk.attach(model, lk.LoRA(rank=2), mode=mode, name="b")
        lk.load(model, tmp_path / "a", name="c", verify="off", trainable=True)
    for name in "bc":
        lk.set_trainable(model, name, True)
        lk.activate(model, name)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in lk.adapter_parameters(model, name))


@pytest.mark.parametrize(
    "change", [{"r": 3}, {"lora_alpha": 9}, {"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}], ids=str
)
def test_a_config_that_contradicts_its_tensors_is_refused(change, tmp_path):
    base = mlp()
    saved = attached(mlp())
    lk.save(saved, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with refused(base, next(iter(change))):
        lk.load(base, tmp_path / "a", verify="off")


def test_an_empty_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = attached(mlp())
    with refused(model, "empty path"):
        lk.save(model, "")
    assert not list(tmp_path.iterdir())


def test_untying_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    lk.attach(model, lk.LoRA(rank=2), "0")
    randomize(model)
    with pytest.warns(UserWarning, match="untied '0.weight'"):
        assert lk.merge(model).untied == ("0.weight",)


@pytest.mark.parametrize("size", [(7, 7), (8, 7), (8, 8)])
def test_what_a_transposed_convolution_is_asked_for_reaches_the_adapter(size):
    model, x = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), torch.randn(1, 2, 4, 4)
    lk.attach(model, lk.LoRA(rank=2), nn.ConvTranspose2d)
    randomize(model)
    y = model(x, output_size=size)
    with lk.merged(model):
        assert_close(model(x, output_size=size), y)


def test_arguments_by_name_reach_the_adapter_in_any_order():
    bag, pair = nn.EmbeddingBag(5, 4, mode="sum"), nn.Bilinear(3, 2, 4)
    calls = [
        (
            bag,
            {"per_sample_weights": torch.randn(3), "offsets": torch.tensor([0, 2]), "input": torch.tensor([4, 1, 1])},
        ),
        (pair, {"input2": torch.randn(5, 2), "input1": torch.randn(5, 3)}),
    ]
    for model, named in calls:
        lk.attach(model, lk.LoRA(rank=2), type(model))
        randomize(model)
        y = model(**named)
        with lk.merged(model):
            assert_close(model(**named), y)
