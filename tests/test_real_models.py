"""Real networks, whose weights others trained: the laws hold on their real layers, and training lowers a real loss."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_bits, assert_close, clones
from torch import Tensor, nn

import lorakit as lk
from benchmarks.real import data, models, stories, usps, vad
from benchmarks.real.training import Loss, Recipe, batches, classification, train

pytestmark = pytest.mark.skipif(
    not ((data.SHARED / "models").is_dir() and (data.SHARED / "data").is_dir()),
    reason=f"no pretrained networks and data in {data.SHARED}; set LORAKIT_SHARED to where they lie",
)


@dataclass(frozen=True)
class Real:
    """A pretrained network, the layers to adapt, what it is called with, and batches of what it is to learn."""

    name: str
    make: Callable[[], nn.Module]
    targets: Any
    layers: int
    """How many weights the targets select."""
    inputs: Callable[[], tuple[Tensor, ...]]
    stream: Callable[[], Iterator[Any]]
    loss: Loss = classification
    lr: float = 1e-2
    steps: int = 10


def photographs() -> Iterator[Any]:
    return batches(data.cifar10("train", every=100), models.cifar_input, 25, seed=0, augment=None)


def digits(name: str) -> Iterator[Any]:
    return usps.stream(name, seed=0)


def lines() -> Iterator[Tensor]:
    return stories.stream(stories.rows(data.text()[:20_000]), seed=0)


CALLED = [nn.Conv2d, nn.Linear]
REAL = [
    Real(
        "resnet20",
        partial(models.resnet, 20),
        CALLED,
        20,
        lambda: (next(photographs())[0][:4],),
        photographs,
        lr=1e-3,
        steps=8,
    ),
    *(
        Real(
            name,
            partial(models.mnist_cnn, name),
            CALLED,
            layers,
            lambda name=name: next(digits(name))[:1],
            partial(digits, name),
        )
        for name, layers in (("lenet5", 5), ("lreich", 5), ("graykode", 4), ("starlento", 4))
    ),
    Real(
        "stories260K",
        stories.make,
        "all-linear",
        36,
        lambda: (next(lines())[:1, :32],),
        lines,
        stories.surprise,
        steps=6,
    ),
    Real(
        "voice",
        models.voice_activity,
        vad.TARGETS,
        6,
        vad.moment,
        partial(vad.stream, 0, clips=16),
        vad.distil,
        steps=4,
    ),
]


@dataclass(frozen=True)
class Trained:
    """One of them with an adapter that took a few steps, and what was before."""

    real: Real
    model: nn.Module
    inputs: tuple[Any, ...]
    before: dict[str, Tensor]
    """The base's tensors."""
    outputs: list[Tensor]
    """Of the base; with the adapter attached, untrained; with it trained."""
    losses: list[float]
    """On the first batch, before and after."""
    plan: Any


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        output = model(*inputs)
    return (output if isinstance(output, Tensor) else output[0]).clone()


def loss_of(real: Real, model: nn.Module) -> float:
    with torch.no_grad():
        return real.loss(model, next(real.stream())).item()


@pytest.fixture(scope="module", params=REAL, ids=lambda real: real.name)
def trained(request) -> Trained:
    real = request.param
    torch.manual_seed(0)
    model, inputs = real.make(), real.inputs()
    before, outputs = clones(model.state_dict()), [outputs_of(model, inputs)]
    plan = lk.attach(model, lk.LoRA(rank=4), real.targets)
    outputs.append(outputs_of(model, inputs))
    losses = [loss_of(real, model)]
    train(model, lk.adapter_parameters(model), real.stream(), Recipe(real.lr, steps=real.steps), real.loss)
    losses.append(loss_of(real, model))
    outputs.append(outputs_of(model, inputs))
    return Trained(real, model, inputs, before, outputs, losses, plan)


def test_every_layer_named_is_adapted(trained):
    assert len(lk.adapters(trained.model)["default"].weights) == trained.real.layers


def test_attaching_changes_no_bit(trained):
    assert torch.equal(trained.outputs[1], trained.outputs[0])


def test_every_update_reaches_the_output(trained):
    report = lk.probe(trained.model, *trained.inputs)
    assert report.ok, report


def test_a_few_steps_lower_the_loss(trained):
    assert trained.losses[1] < 0.95 * trained.losses[0], trained.losses


def test_training_moves_nothing_but_the_adapter(trained):
    state = trained.model.state_dict()
    assert_bits({key: state[key] for key in trained.before}, trained.before)
    assert not torch.equal(trained.outputs[2], trained.outputs[0])


def test_disabled_it_is_the_original_to_the_bit(trained):
    with lk.disabled(trained.model):
        assert torch.equal(outputs_of(trained.model, trained.inputs), trained.outputs[0])
    assert torch.equal(outputs_of(trained.model, trained.inputs), trained.outputs[2])


def test_saved_and_loaded_onto_the_original_it_gives_the_same_bits(trained, tmp_path):
    lk.save(trained.model, tmp_path / "adapter.safetensors")
    fresh = trained.real.make()
    lk.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(outputs_of(fresh, trained.inputs), trained.outputs[2])


def test_merged_it_gives_the_same_to_precision_and_comes_back(trained):
    with lk.merged(trained.model):
        assert_close(outputs_of(trained.model, trained.inputs), trained.outputs[2], factor=5.0)
    assert torch.equal(outputs_of(trained.model, trained.inputs), trained.outputs[2])


def test_detached_it_is_as_it_came(trained):
    model = copy.deepcopy(trained.model)
    lk.detach(model)
    assert_bits(model.state_dict(), trained.before)
    assert torch.equal(outputs_of(model, trained.inputs), trained.outputs[0])


def test_in_the_weight_gives_what_beside_gives(trained, tmp_path):
    model = trained.real.make()
    lk.attach(model, lk.LoRA(rank=4), trained.real.targets, mode="weight")
    state, wanted = model.state_dict(), trained.model.state_dict()
    assert list(state) == list(wanted)
    model.load_state_dict(wanted)
    assert_close(outputs_of(model, trained.inputs), trained.outputs[2], factor=5.0)
