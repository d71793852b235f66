"""Law 4: merging keeps the output, says what rounding took, and `merged` gives every bit of the base back."""

import copy
import pickle

import pytest
import torch
from helpers import (
    assert_bits,
    assert_close,
    assert_same,
    attach,
    attached,
    clones,
    picture,
    randomize,
    refused,
    run_everywhere,
)
from kinds import LORAS, over_pairs, over_pairs_and_dtypes
from models import mlp
from torch import nn

import lorakit as lk

over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])


def three() -> nn.Module:
    """A model with the adapters a, b and c."""
    model = mlp()
    for i, name in enumerate("abc"):
        attached(model, list(LORAS.values())[i], name=name, seed=i)
    return model


@over_pairs_and_dtypes
def test_merged_is_attached_to_precision_and_comes_back_to_the_bit(case, variant, dtype):
    model, inputs = case.build(dtype)
    attach(model, case, variant, inputs)
    randomize(model)
    before, y = picture(model), run_everywhere(model, inputs)
    with lk.merged(model):
        assert not any("lora" in key for key in model.state_dict())
        for regime, merged in run_everywhere(model, inputs).items():
            assert_close(merged, y[regime])
    assert_bits(run_everywhere(model, inputs), y)
    assert_same(without_hook_ids(picture(model)), without_hook_ids(before))


def without_hook_ids(seen):
    """Torch counts hooks up: one that was taken off and put back has another number."""
    anatomy = {
        path: (cls, {key: [v for _, v in value] if key.startswith("_forward_hooks") else value for key, value in own})
        for path, (cls, attributes) in seen[0].items()
        for own in [attributes.items()]
    }
    return anatomy, seen[1]


@over_pairs
@pytest.mark.filterwarnings("ignore:merging untied:UserWarning")
def test_merging_for_good_keeps_the_output_and_leaves_a_plain_model(case, variant):
    model, inputs = case.build()
    plain = copy.deepcopy(model)
    attach(model, case, variant, inputs)
    randomize(model)
    y = run_everywhere(model, inputs)
    report = lk.merge(model)
    for regime, merged in run_everywhere(model, inputs).items():
        assert_close(merged, y[regime])
    assert {row.name for row in report.weights} <= set(dict(plain.named_parameters(remove_duplicate=False)))
    assert all(row.change > 0 and row.lost < 1e-3 for row in report.weights)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert lk.adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_survives_a_thousand_rounds_of_merging_in_half_precision():
    torch.manual_seed(0)
    model = mlp().to(torch.bfloat16)
    base = clones(model.state_dict())
    attached(model)
    for _ in range(1000):
        with lk.merged(model):
            pass
    lk.detach(model)
    assert_bits(model.state_dict(), base)


def test_merging_names_what_it_takes_away_and_refuses_what_is_not_there():
    model, x = three(), torch.randn(3, 6)
    with refused(model, "'d'"):
        lk.merge(model, "d")
    lk.activate(model, [])
    with refused(model, "nothing to merge"):
        lk.merge(model)
    with lk.active(model, "b"):
        y = model(x)
    with pytest.warns(UserWarning, match="'a', 'c'"):
        report = lk.merge(model, "b")
    assert report.dropped == ("a", "c")
    assert_close(model(x), y)


def test_merging_says_what_rounding_lost():
    model = attached(nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(model):
            parameter *= 1e-3
    with pytest.warns(UserWarning, match=r"0\.weight"):
        report = lk.merge(model)
    assert report.weights[0].lost > 0.5
    assert "0.weight" in str(report)


def test_merging_what_is_not_finite_is_refused():
    model = attached(mlp())
    with torch.no_grad():
        lk.adapter_parameters(model)[0][0, 0] = torch.inf
    with refused(model, "0.weight"):
        lk.merge(model)
    with refused(model, "0.weight"), lk.merged(model):
        pass


@over_modes
def test_merging_under_autocast_is_as_exact_as_without(mode):
    model, x = attached(mlp(), mode=mode), torch.randn(3, 6)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16), lk.merged(model), torch.autocast("cpu", enabled=False):
        assert_close(model(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        lk.merge(model)
    assert_close(model(x), y)


def test_inside_merged_every_verb_is_refused(tmp_path):
    model = attached(mlp())
    lk.save(model, tmp_path / "a")
    verbs = {
        "attach": lambda: lk.attach(model, lk.LoRA(rank=2), name="b"),
        "attach-to-a-part": lambda: lk.attach(model[0], lk.LoRA(rank=2), name="b"),
        "plan": lambda: lk.plan(model, lk.LoRA(rank=2), name="b"),
        "load": lambda: lk.load(model, tmp_path / "a", name="b"),
        "save": lambda: lk.save(model, tmp_path / "b"),
        "activate": lambda: lk.activate(model, "default"),
        "disabled": lambda: lk.disabled(model).__enter__(),
        "merged": lambda: lk.merged(model).__enter__(),
        "merge": lambda: lk.merge(model),
        "remove": lambda: lk.remove(model, "default"),
        "detach": lambda: lk.detach(model),
        "probe": lambda: lk.probe(model, torch.randn(3, 6)),
    }
    before = lk.adapters(model)
    with lk.merged(model):
        for verb in verbs.values():
            with refused(model, "merged"):
                verb()
    assert lk.adapters(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_merged_is_a_plain_model(copied):
    model, x = attached(mlp()), torch.randn(3, 6)
    with lk.merged(model):
        plain = copied(model)
    y = plain(x)
    assert_close(y, model(x))
    assert lk.adapters(plain) == {}
    lk.attach(plain, lk.LoRA(rank=2))
    assert torch.equal(plain(x), y)


def test_changes_to_the_merged_weights_go_with_the_block():
    model, x = attached(mlp()), torch.randn(3, 6)
    y = model(x)
    with lk.merged(model):
        model[0].weight.fill_(1.0)
        model.eval()
    assert torch.equal(model(x), y)
    assert not any(module.training for module in model.modules())
