"""What the experiment proves about its own adapter, each a yes or a no."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.digits.base import restore
from lorakit.digits.data import Digits
from lorakit.digits.network import DigitNet, predict
from lorakit.layers import adapters_of


@dataclass(frozen=True)
class Logits:
    """What one network made of the test images, each (n, 10)."""

    before: Tensor
    """Before anything was attached."""
    adapted: Tensor
    """With the adapter beside the layers."""
    disabled: Tensor
    merged: Tensor


def prove(
    net: DigitNet,
    name: str,
    untouched: dict[str, Tensor],
    base_path: Path,
    adapter_path: Path,
    test: Digits,
    logits: Logits,
) -> dict[str, bool]:
    """Every claim, checked on the test images.

    Args:
        net: the network with the trained adapter, active.
        name: the adapter.
        untouched: copies of the base's tensors from before attaching.
        base_path: the base on disk.
        adapter_path: the adapter on disk.
        test: the images.
        logits: what the network made of them.
    """
    state = net.state_dict()
    in_weight = _in_the_weight(net, name)
    reloaded = restore(base_path)
    lk.load(reloaded, adapter_path)
    return {
        "frozen_weights_unchanged": all(torch.equal(state[key], value) for key, value in untouched.items()),
        "enabled_weight_is_w_plus_s_ba": _weights_read_right(in_weight, name, untouched),
        "beside_and_in_weight_agree": same_answers(logits.adapted, predict(in_weight, test)),
        "disabled_is_the_base_bit_for_bit": torch.equal(logits.disabled, logits.before),
        "merged_agrees": same_answers(logits.adapted, logits.merged),
        "saved_and_loaded_bit_equal": torch.equal(predict(reloaded, test), logits.adapted),
    }


def _in_the_weight(net: DigitNet, name: str) -> DigitNet:
    """A copy of the network with the same factors applied in the weight."""
    factors = lk.adapter_state_dict(net, name)
    twin = copy.deepcopy(net)
    lk.detach(twin)
    lk.attach(twin, lk.adapters(net)[name].variant, mode="weight", name=name)
    with torch.no_grad():
        for key, tensor in lk.adapter_state_dict(twin, name).items():
            tensor.copy_(factors[key])
    return twin


def _weights_read_right(net: DigitNet, name: str, untouched: dict[str, Tensor]) -> bool:
    """Each layer's weight reads as W + s·BA with the adapter enabled and, to the bit, as W without."""
    right = True
    scale = lk.adapters(net)[name].variant.scale  # type: ignore[attr-defined]
    for path in ("linear1", "linear2", "linear3"):
        layer = net.get_submodule(path)
        adapters = adapters_of(layer)
        assert adapters is not None
        update = adapters["weight"][name]
        base = untouched[f"{path}.weight"]
        with torch.no_grad():
            expected = base + scale * (update.get_parameter("B") @ update.get_parameter("A"))
            right &= torch.allclose(_weight(layer), expected, rtol=1e-6, atol=1e-6)
            right &= not torch.equal(_weight(layer), base)
            with lk.disabled(net):
                right &= torch.equal(_weight(layer), base)
    return right


def _weight(layer: nn.Module) -> Tensor:
    """What reading the attribute gives."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def same_answers(one: Tensor, two: Tensor) -> bool:
    """Whether two ways to compute the same logits (n, 10) give the same predictions.

    They must agree to float32's rounding, and an answer may differ only where the two best logits are closer to each
    other than the two computations are.
    """
    gap = float((one - two).abs().max())
    top = one.topk(2, dim=1).values
    tie = top[:, 0] - top[:, 1] <= 2 * gap
    same = one.argmax(1) == two.argmax(1)
    return gap <= 1e-4 * float(one.abs().max()) and bool((same | tie).all())
