"""PEFT as an oracle: the same factors give the same outputs and gradients, and files go both ways."""

import copy
import json
import warnings

import pytest
import torch
from helpers import attached, randomize, refused
from peers import SPECS, assert_near, build, by_peft, live_key, out, over_peers
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# Their own, of each other and of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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
