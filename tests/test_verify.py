"""How the base is compared with the one that an adapter was trained on: 256 values of a weight, or every byte."""

import copy

import pytest
import torch
from helpers import attached, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.exchange import write
from lorakit.files import adapter_value
from lorakit.fingerprint import checksum, fingerprint, remembered_checksum


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 3))


def unseen(weight: torch.Tensor) -> int:
    """The place of a value that the sample does not look at."""
    return 1 if weight.numel() > 512 else -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_sees_one_changed_number_and_names_the_layers(dtype, tmp_path):
    base = wide().to(dtype)
    lk.save(attached(copy.deepcopy(base)), tmp_path / "a")
    lk.load(copy.deepcopy(base), tmp_path / "a", verify="full")
    with torch.no_grad():
        for layer in (0, 2):
            base[layer].weight.view(-1)[unseen(base[layer].weight)] *= -1
    lk.load(copy.deepcopy(base), tmp_path / "a")  # the sample does not
    with refused(base, "'0.weight' has a few other values", "'2.weight' has a few other values"):
        lk.load(base, tmp_path / "a", verify="full")
    lk.load(base, tmp_path / "a", verify="off")


def test_sample_names_every_layer_that_differs(tmp_path):
    base = wide()
    lk.save(attached(copy.deepcopy(base)), tmp_path / "a")
    with torch.no_grad():
        base[0].weight += 1
        base[4].weight += 1
    for verify in ("sample", "full"):
        with refused(base, "'0.weight' has other values", "'4.weight' has other values") as _:
            lk.load(base, tmp_path / "a", verify=verify)


def test_full_without_a_checksum_says_so(tmp_path):
    base = wide()
    model = attached(copy.deepcopy(base))
    write(adapter_value(model), tmp_path / "a")  # which reads no weight as a whole
    write(adapter_value(model), tmp_path / "b", "peft")
    for name in "ab":
        with refused(base, "no checksum", "'0.weight'", "verify='sample'"):
            lk.load(base, tmp_path / name, verify="full")
        lk.load(copy.deepcopy(base), tmp_path / name)
    with refused(base, "'everything'", "'full'"):
        lk.load(base, tmp_path / "a", verify="everything")


BLOCK = 2**14


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 7, 255, BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 9 * BLOCK, 17 * BLOCK + 3]),
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
)
def test_a_checksum_depends_on_every_bit_and_on_the_order(size, data, dtype):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
    first = checksum(weight)
    assert first == checksum(weight.clone()) and len(first) == 32
    raw = weight.view(torch.uint8)
    places = data.draw(st.lists(st.integers(0, raw.numel() - 1), min_size=1, max_size=3, unique=True))
    bit = data.draw(st.integers(0, 7))
    changed = raw.clone()
    for place in places:
        changed[place] ^= 1 << bit
    assert checksum(changed.view(dtype)) != first
    assert checksum(raw[:-1]) != first
    swapped = raw.clone()
    swapped[0], swapped[-1] = raw[-1], raw[0]
    assert (checksum(swapped.view(dtype)) == first) == torch.equal(swapped, raw)


def test_signs_of_an_even_count_of_numbers_are_seen():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for weight in (torch.randn(4 * BLOCK), torch.ones(4 * BLOCK), torch.zeros(4 * BLOCK)):
            weight = weight.to(dtype)
            assert checksum(weight) != checksum(-weight)
            for step in (2, 4, 8, 32):
                some = weight.clone()
                some[::step] *= -1
                assert checksum(some) not in (checksum(weight), checksum(-weight))


def test_a_checksum_goes_by_the_values_and_not_by_where_they_lie():
    weight = torch.randn(300, 400)
    assert checksum(weight) == checksum(weight.t().contiguous().t()) == checksum(torch.cat([weight, weight])[300:])
    shifted = torch.empty(300 * 400 + 1)[1:].view(300, 400).copy_(weight)
    assert checksum(shifted) == checksum(weight)
    assert checksum(weight, weight) != checksum(weight)
    assert (
        checksum(torch.ones(1, 256)[:, :1].view(1))
        == checksum(torch.ones(4, 256).t()[0, :1])
        == checksum(torch.ones(1))
    )
    assert checksum(torch.empty(3, device="meta")) is None and checksum() is None
    assert checksum(torch.empty(0)) != checksum(torch.empty(0), torch.empty(0))


def test_the_checksum_is_the_same_in_every_version():
    assert checksum(torch.arange(3 * BLOCK, dtype=torch.int32)) == "61327910ec8ab1b5622e38ae9750d413"


def test_a_checksum_is_taken_anew_where_the_weight_changed():
    """Remembered between saves: in-place changes, other memory and writes past torch's count are noticed."""
    weight = torch.nn.Parameter(torch.randn(300, 200))

    def remembered():
        return remembered_checksum(fingerprint(weight), weight)

    assert remembered() == checksum(weight) == remembered()
    with torch.no_grad():
        weight[7, 7] += 1
    assert remembered() == checksum(weight)
    weight.data.mul_(2)
    assert remembered() == checksum(weight)
    weight.data = torch.randn(300, 200)
    assert remembered() == checksum(weight)
    with torch.inference_mode():
        inside = torch.randn(30, 20)
        assert remembered_checksum(fingerprint(inside), inside) == checksum(inside)
