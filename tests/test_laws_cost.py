"""What the verbs cost: nothing grows with the adapters that are there, and nothing is shared that should not be."""

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_close, assert_same, attach, picture, randomize
from kinds import VARIANTS
from models import mlp
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.fingerprint import fingerprint
from lorakit.safe import read_in_order
from lorakit.storage import read_tensors

PACKAGE = str(Path(lk.__file__).parent)
over_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def calls(function: Callable[[], object]) -> int:
    """How often functions of lorakit were called, without those that act on single layers."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        path = frame.f_code.co_filename
        count += event == "call" and path.startswith(PACKAGE) and not path.startswith(f"{PACKAGE}/layers")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_no_verb_costs_more_the_more_adapters_are_there(base, saved):
    verbs = {
        "load": lambda name: lk.load(base, saved, name=name),
        "activate": lambda name: lk.activate(base, name),
        "adapter_state_dict": lambda name: lk.adapter_state_dict(base, name),
        "save": lambda name: lk.save(base, saved.with_name("again.safetensors"), name),
        "remove": lambda name: lk.remove(base, name),
    }
    lk.load(base, saved, name="first")
    lk.save(base, saved.with_name("again.safetensors"), "first")  # reads the base as a whole, once
    few = {verb: calls(lambda do=do: do("a")) for verb, do in verbs.items()}
    for i in range(6):
        lk.load(base, saved, name=f"n{i}")
    assert {verb: calls(lambda do=do: do("b")) for verb, do in verbs.items()} == few


def alike() -> nn.Sequential:
    """Layers that differ in their sizes, their dtype or how they are adapted, and two that do not."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).double(), nn.Linear(6, 6, bias=False), nn.Linear(5, 6)]
    return nn.Sequential(*layers)


def test_weights_that_are_alike_in_part_get_each_what_they_need(tmp_path):
    model = alike()
    fresh = copy.deepcopy(model)
    ranks = {"1": 3, "4": 3}
    plan = lk.attach(model, lk.LoRA(rank=2), ["0", "1", "2", "3.weight", "4"], ranks=ranks)
    randomize(model)
    assert [row.bytes for row in plan.rows] == [96, 144, 192, 96, 132]
    assert [row.applied for row in plan.rows] == [*["beside"] * 3, "in the weight", "beside"]
    lk.save(model, tmp_path / "a")
    assert lk.load(fresh, tmp_path / "a") == plan
    assert_bits(fresh.state_dict(), model.state_dict())


@over_variants
def test_loaded_updates_share_nothing_that_changes(variant, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    case = type("Case", (), {"how": {"targets": "all-linear"}})
    attach(model, case, variant, (torch.randn(40, 6),))
    lk.save(model, tmp_path / "a")
    lk.detach(model)
    for name in "ab":
        lk.load(model, tmp_path / "a", name=name)
    updates = [model[i].lora.weight._modules[name] for i in (0, 1) for name in "ab"]
    held = [value for update in updates for value in vars(update).values() if isinstance(value, dict | list | set)]
    assert len({id(value) for value in held}) == len(held)
    tensors = [tensor for update in updates for tensor in update._parameters.values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_what_is_loaded_lies_in_memory_of_its_own(base, saved):
    lk.load(base, saved)
    for tensor in lk.adapter_parameters(base):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # pickling a layer takes no other's along
        assert tensor.data_ptr() % 64 == 0  # as torch's own: alignment may decide how a product rounds
    one, whole = io.BytesIO(), io.BytesIO()
    torch.save(base[0].lora.weight._modules["default"], one)
    torch.save(base, whole)
    assert one.tell() < whole.tell()


WRITTEN = {
    torch.float32: "79692d2b7021d22803b90f0e907b3a82",
    torch.bfloat16: "dd1d635ec23adf87367209a55a3c1552",
    torch.float64: "1af384f73560c6cb2bfb697b696abd62",
    torch.int8: "3ac62795b295153bf4d7831b26e744c8",
}
"""Fingerprints as files of the first version hold them."""


@pytest.mark.parametrize("dtype", WRITTEN, ids=str)
def test_files_that_are_there_keep_their_fingerprints(dtype):
    assert fingerprint(torch.arange(3000).view(60, 50).to(dtype)) == WRITTEN[dtype]
    assert fingerprint(torch.arange(12.0).view(3, 4), torch.ones(2)) == "421e2c277de21fa337d9eaabab66b5b2"


def test_a_sum_that_is_too_large_is_no_infinity(base, tmp_path):
    lk.attach(base, lk.LoRA(rank=2))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(base):
            parameter.fill_(3e38)
    lk.save(base, tmp_path / "a")
    lk.load(mlp(), tmp_path / "a", verify="off")


TENSORS = {
    "floats": torch.randn(3, 4),
    "halves": torch.randn(5).half(),
    "brains": torch.randn(2, 3, 2).bfloat16(),
    "doubles": torch.randn(7, 1).double(),
    "scalar": torch.tensor(3.0),
}


@pytest.mark.parametrize("more", [{}, {"none": torch.empty(0, 3)}, {"integers": torch.arange(3)}], ids=str)
def test_a_file_is_read_as_safetensors_reads_it(more, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({**TENSORS, **more}, path, metadata={"format": "pt"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"format": "pt"}
    assert_bits(dict(sorted(tensors.items())), dict(sorted(load_file(path).items())))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert (read_in_order(path) is None) == bool(more)  # what is not floats, or empty, is left to the library


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_file_that_is_not_in_order_is_left_to_the_library(cut, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    for damaged in (
        content[:cut],
        content + b"\0",
        content.replace(b'"F32"', b'"F64"'),
        content.replace(b"[0,", b"[1,"),
    ):
        path.write_bytes(damaged)
        assert read_in_order(path) is None
        with pytest.raises(lk.LorakitError, match="damaged"):
            read_tensors(path)


MIXED = ("beside", "weight", "beside", "weight")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)], ids=str)
@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 6), nn.Conv1d(6, 6, 1), nn.Embedding(6, 6)], ids=lambda m: type(m).__name__
)
def test_residents_in_both_modes_come_and_go_in_any_order(layer, order):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.arange(6) if isinstance(layer, nn.Embedding) else torch.randn(6, 6)
    before, base = picture(model), model(x)
    names, added = "abcd", {}
    for name, mode in zip(names, MIXED, strict=True):
        lk.attach(model, lk.LoRA(rank=2), type(layer), mode=mode, name=name)
        randomize(model, name)
        added[name] = model(x) - base
    for gone in order:
        left = list(lk.adapters(model))
        lk.activate(model, left)
        assert_close(model(x), base + sum(added[name] for name in left))
        lk.remove(model, names[gone])
    assert_same(picture(model), before)


def test_modules_begin_as_torch_begins_them(base):
    lk.attach(base, lk.LoRA(rank=2))
    added = [module for module in base.modules() if type(module).__module__.startswith("lorakit")]
    plain = vars(nn.Module())
    for module in added:
        assert plain.keys() <= vars(module).keys()
        assert all(type(vars(module)[name]) is type(value) for name, value in plain.items())
    held = [value for module in added for value in vars(module).values() if isinstance(value, dict | list | set)]
    assert len({id(value) for value in held}) == len(held)
