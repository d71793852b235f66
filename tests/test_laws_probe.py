"""`probe`: it tells acting adapters from silent ones, and changes nothing while it looks."""

import pytest
import torch
from helpers import assert_same, attached, picture, refused
from models import mlp
from torch import nn
from torch.nn import functional as F

import lorakit as lk


def effects(report) -> dict[str, tuple[str, str]]:
    return {row.weight: (row.train, row.eval) for row in report.weights}


class Sly(nn.Module):
    """Calls one layer, reads the weight of another, forgets a third, and drops the output of a fourth."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.forgotten, self.dropped = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        self.dropped(x)
        return F.linear(self.called(x), self.read.weight)


def test_silent_adapters_are_found_and_the_weight_form_helps():
    model, x = Sly(), torch.randn(3, 6)
    lk.attach(model, lk.LoRA(rank=2))
    report = lk.probe(model, x)
    assert not report.ok
    assert effects(report) == {
        "called.weight": ("effective", "effective"),
        "read.weight": ("bypassed", "bypassed"),
        "forgotten.weight": ("unreached", "unreached"),
        "dropped.weight": ("bypassed", "bypassed"),
    }
    assert "unreached" in str(report)
    lk.detach(model)
    lk.attach(model, lk.LoRA(rank=2), targets=["called", "read"], mode="weight")
    assert lk.probe(model, x).ok


class TrainsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) if self.training else x + 1


def test_a_layer_that_runs_in_one_mode_alone():
    model = TrainsOnly()
    lk.attach(model, lk.LoRA(rank=2))
    assert effects(lk.probe(model, torch.randn(3, 6))) == {"layer.weight": ("effective", "unreached")}


class Busy(nn.Module):
    """Dropout, running statistics, a buffer that counts and a buffer that is a view."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.randn(6).expand(3, 6))

    def forward(self, x):
        self.calls += 1
        return {"out": [self.dropout(self.norm(self.layer(x))) + self.shift], "note": "text"}


def test_probing_changes_nothing():
    model = attached(Busy())
    attached(model, name="second")
    lk.activate(model, {"default": 0.5, "second": 2.0})
    model.norm.eval()
    for name in ("default", "second"):
        before, state = picture(model), torch.get_rng_state()
        assert lk.probe(model, torch.randn(3, 6, generator=torch.Generator()), name=name).ok
        assert_same(picture(model), before)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_fails_while_it_is_probed_is_put_back():
    model = attached(mlp())
    before = picture(model)
    with pytest.raises(RuntimeError):
        lk.probe(model, torch.randn(3, 7))
    assert_same(picture(model), before)


def test_probing_between_forward_and_backward_does_not_disturb_training():
    model, x = attached(mlp()), torch.randn(3, 6)
    loss = model(x).sum()
    assert lk.probe(model, x).ok
    loss.backward()


def test_probe_says_what_it_needs():
    model = attached(mlp())
    attached(model, name="second")
    with refused(model, "'third'"):
        lk.probe(model, torch.randn(3, 6), name="third")
    lk.activate(model, [])
    with refused(model, "'default'", "'second'"):
        lk.probe(model, torch.randn(3, 6))

    class Mute(nn.Sequential):
        def forward(self, x):
            super().forward(x)

    mute = attached(Mute(nn.Linear(6, 5)))
    with refused(mute, "no tensor"):
        lk.probe(mute, torch.randn(3, 6))
