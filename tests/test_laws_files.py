"""Law 6, first half: what is saved comes back to the bit."""

import copy

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
    run,
    run_everywhere,
)
from kinds import over_cases, over_dtypes, over_pairs_and_dtypes
from safetensors.torch import load_file

import lorakit as lk

over_forms = pytest.mark.parametrize("form", ["directory", "file.safetensors"])


@over_pairs_and_dtypes
def test_save_then_load_on_a_fresh_copy_is_equal_to_the_bit(case, variant, dtype, tmp_path):
    form = "file.safetensors" if dtype == torch.float64 else "directory"
    model, inputs = case.build(dtype)
    fresh = copy.deepcopy(model)
    plan = attach(model, case, variant, inputs, name="sql")
    randomize(model, "sql")
    lk.save(model, tmp_path / form)
    loaded = lk.load(fresh, tmp_path / form, trainable=True)
    assert_bits(run_everywhere(fresh, inputs), run_everywhere(model, inputs))
    assert [(r.weight, r.tensors, r.applied) for r in loaded.rows] == [
        (r.weight, r.tensors, r.applied) for r in plan.rows
    ]
    assert lk.adapters(fresh) == lk.adapters(model)
    assert_bits(lk.adapter_state_dict(fresh), lk.adapter_state_dict(model))
    assert_bits(fresh.state_dict(), model.state_dict())


@over_cases
def test_loading_freezes_the_base_and_detaching_thaws_it(case, tmp_path):
    model, _ = case.build()
    fresh = copy.deepcopy(model)
    before = picture(fresh)
    lk.save(attached(model, **case.how), tmp_path / "a")
    lk.load(fresh, tmp_path / "a")
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    lk.detach(fresh)
    assert_same(picture(fresh), before)


def test_one_file_can_be_loaded_several_times_and_written_again_the_same(base, saved, tmp_path):
    x = torch.randn(3, 6)
    lk.load(base, saved, name="a")
    y = base(x)
    with refused(base, "'a'", "already resident"):
        lk.load(base, saved, name="a")
    lk.load(base, saved, name="b")
    assert torch.equal(base(x), y)
    lk.activate(base, {"a": 0.5, "b": 0.5})
    assert_close(base(x), y)
    lk.save(base, tmp_path / "b", name="b")
    assert_bits(load_file(tmp_path / "b" / "adapter_model.safetensors"), load_file(saved))


def test_the_name_is_the_saved_one_unless_another_is_given(base, tmp_path):
    lk.save(attached(copy.deepcopy(base), name="sql"), tmp_path / "elsewhere")
    lk.load(base, tmp_path / "elsewhere")
    lk.load(base, str(tmp_path / "elsewhere"), name="other")
    assert list(lk.adapters(base)) == ["sql", "other"]
    assert [adapter.strength for adapter in lk.adapters(base).values()] == [0.0, 1.0]
    with refused(base, "'a.b'"):
        lk.load(base, tmp_path / "elsewhere", name="a.b")


def test_what_is_written_is_the_state_dict_and_nothing_else_is_left(base, tmp_path):
    attached(base)
    lk.save(base, tmp_path / "deep" / "down")
    files = sorted(path.name for path in (tmp_path / "deep" / "down").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    state = lk.adapter_state_dict(base)
    assert_bits(dict(sorted(load_file(tmp_path / "deep" / "down" / files[1]).items())), dict(sorted(state.items())))
    assert not any(tensor.requires_grad for tensor in state.values())
    assert set(state) == {f"base_model.model.{i}.lora_{t}.weight" for i in (0, 2) for t in "AB"}


@over_forms
def test_saving_replaces_whole_and_refuses_whole(base, form, tmp_path):
    x = torch.randn(3, 6)
    fresh, path = copy.deepcopy(base), tmp_path / form
    lk.save(attached(base), path)
    randomize(base, seed=2)
    lk.save(base, path)
    content = clones(load_file(path if path.is_file() else path / "adapter_model.safetensors"))
    with torch.no_grad():
        lk.adapter_parameters(base)[0][0, 0] = torch.nan
    with refused(base, "'default'", "0.lora_A.weight"):
        lk.save(base, path)
    assert_bits(load_file(path if path.is_file() else path / "adapter_model.safetensors"), content)
    lk.load(fresh, path)
    randomize(base, seed=2)
    assert torch.equal(fresh(x), base(x))
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_saving_says_what_it_cannot_do(base, tmp_path):
    with refused(base, "no adapter"):
        lk.save(base, tmp_path / "a")
    attached(base)
    with refused(base, "'sql'", "'default'"):
        lk.save(base, tmp_path / "a", name="sql")
    attached(base, name="second")
    with refused(base, "which", "'default'", "'second'"):
        lk.save(base, tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "x.safetensors").mkdir()
    for path in ("file", "file/below", "x.safetensors"):
        with refused(base, path):
            lk.save(base, tmp_path / path, name="second")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_same_base_in_another_dtype_needs_a_word(base, saved):
    x = torch.randn(3, 6)
    lk.load(wide := copy.deepcopy(base), saved)
    base.to(torch.bfloat16)
    with refused(base, "bfloat16", "float32", "verify='off'"):
        lk.load(base, saved)
    lk.load(base, saved, verify="off")
    assert_close(base(x.to(torch.bfloat16)), wide(x).to(torch.bfloat16))
    assert {p.dtype for p in lk.adapter_parameters(base)} == {torch.float32}


@over_dtypes
def test_files_hold_the_factors_exactly(dtype, base, tmp_path):
    base.to(dtype)
    attached(base)
    lk.save(base, tmp_path / "a.safetensors")
    state = lk.adapter_state_dict(base)
    assert_bits(dict(sorted(load_file(tmp_path / "a.safetensors").items())), dict(sorted(state.items())))
    assert {tensor.dtype for tensor in state.values()} == {dtype if dtype.itemsize > 2 else torch.float32}
    assert run(base, (torch.randn(3, 6, dtype=dtype),)).dtype == dtype
