"""Law 6, second half: what does not fit is refused with everything that is wrong, and the model is as it was."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same, attached, picture, refused
from models import Reader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorakit as lk


def edit(path: Path, change=None, header=None) -> None:
    """Change the tensors of a saved file, or its header."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if change is not None:
        change(tensors)
    if header is not None:
        raw = json.loads(metadata["lorakit"])
        header(raw)
        metadata["lorakit"] = json.dumps(raw)
    save_file(tensors, path, metadata=metadata)


def drop_one(tensors):
    del tensors["base_model.model.0.lora_B.weight"]


def add_one(tensors):
    tensors["base_model.model.9.lora_A.weight"] = torch.zeros(2, 6)


def transpose(tensors):
    tensors["base_model.model.0.lora_A.weight"] = tensors["base_model.model.0.lora_A.weight"].t().contiguous()


def spoil(tensors):
    tensors["base_model.model.2.lora_A.weight"][0, 0] = torch.nan


def blow_up(tensors):
    tensors["base_model.model.2.lora_B.weight"][0, 0] = torch.inf


def round_off(tensors):
    key = "base_model.model.2.lora_B.weight"
    tensors[key] = tensors[key].int()


CHANGES = {
    drop_one: ("0.lora_B.weight", "missing"),
    add_one: ("9.lora_A.weight", "no part"),
    transpose: ("0.lora_A.weight", "(6, 2)", "(2, 6)"),
    spoil: ("2.lora_A.weight", "NaN"),
    blow_up: ("2.lora_B.weight", "infinity"),
    round_off: ("2.lora_B.weight", "int32"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_does_not_fit_is_refused(change, base, saved):
    edit(saved, change)
    with refused(base, *CHANGES[change]):
        lk.load(base, saved)


def test_one_error_lists_all_that_is_wrong(base, saved):
    base[2] = torch.nn.Linear(5, 4)
    edit(saved, lambda tensors: [change(tensors) for change in (drop_one, add_one, transpose, spoil)])
    with refused(base, *(word for change in (drop_one, add_one, transpose, spoil) for word in CHANGES[change]), "2.w"):
        lk.load(base, saved)


def test_tensors_of_two_dtypes_act_or_are_refused(base, saved):
    def mix(tensors):
        key = "base_model.model.0.lora_B.weight"
        tensors[key] = tensors[key].half()

    edit(saved, mix)
    try:
        lk.load(base, saved)
    except lk.LorakitError:
        return
    base(torch.randn(3, 6))


def test_another_base_is_refused(base, saved):
    with torch.no_grad():
        base[0].weight[1, 2] += 1e-3
    with refused(base, "'0.weight'", "values"):
        lk.load(base, saved)
    lk.load(base, saved, verify="off")
    wider = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    for verify in ("sample", "off"):
        with refused(wider, "'0.weight'", "(8, 6)", "(5, 6)", "'2.weight'"):
            lk.load(wider, saved, verify=verify)
    reader = Reader()
    with refused(reader, "no layer '0'", "no layer '2'"):
        lk.load(reader, saved)
    with refused(wider, "'yes'"):
        lk.load(wider, saved, verify="yes")


def test_every_truncation_is_refused(base, saved):
    content = saved.read_bytes()
    before = picture(base)
    for length in [*range(0, 16), *range(16, len(content), 37), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(lk.LorakitError):
            lk.load(base, saved)
    assert_same(picture(base), before)


def test_a_damaged_byte_gives_an_adapter_or_a_refusal_and_nothing_between(base, saved):
    content = saved.read_bytes()
    before, x = picture(base), torch.randn(3, 6)
    for place in range(0, len(content), 5):
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            lk.load(base, saved)
        except lk.LorakitError:
            pass
        else:
            base(x)
            lk.detach(base)
    assert_same(picture(base), before)


HEADERS = {
    "version": (lambda raw: raw.update(version=99), "version 99"),
    "no-version": (lambda raw: raw.pop("version"), "version"),
    "no-variant": (lambda raw: raw.pop("variant"), "damaged"),
    "unknown-variant": (lambda raw: raw["variant"].update(type="Magic"), "Magic"),
    "rank": (lambda raw: raw["variant"].update(rank=0), "rank"),
    "huge-rank": (lambda raw: raw["variant"].update(rank=10**18), "rank"),
    "rank-beyond-64-bits": (lambda raw: raw["variant"].update(rank=10**30), "rank"),
    "another-rank": (lambda raw: raw["variant"].update(rank=3), "(3, 6)"),
    "alpha": (lambda raw: raw["variant"].update(alpha="much"), "alpha"),
    "field": (lambda raw: raw["variant"].update(surprise=1), "surprise"),
    "no-weights": (lambda raw: raw.update(weights=[]), "no weight"),
    "weights": (lambda raw: raw.update(weights=3), "damaged"),
    "weight": (lambda raw: raw["weights"].append(None), "damaged"),
    "path": (lambda raw: raw["weights"][0].update(path=7), "damaged"),
    "mode": (lambda raw: raw["weights"][0].update(mode="above"), "above"),
    "shape": (lambda raw: raw["weights"][0].update(shape=["5", 6]), "damaged"),
    "layer": (lambda raw: raw["weights"][0].update(path="nowhere"), "nowhere"),
    "parameter": (lambda raw: raw["weights"][0].update(parameter="wait"), "0.wait"),
    "twice": (lambda raw: raw["weights"].append(raw["weights"][0]), "missing"),
    "name": (lambda raw: raw.update(name=None), "damaged"),
    "bad-name": (lambda raw: raw.update(name="../up"), "../up"),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_makes_no_sense_is_refused(change, base, saved):
    edit(saved, header=HEADERS[change][0])
    with refused(base, HEADERS[change][1]):
        lk.load(base, saved)


def test_paths_that_hold_no_adapter_are_refused(base, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(load_file(saved), tmp_path / "bare" / "adapter_model.safetensors")
    for path in ("nowhere", "empty", "noise.safetensors", "foreign.safetensors", "bare"):
        with refused(base, path):
            lk.load(base, tmp_path / path)


def test_a_config_of_another_save_is_refused(base, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    lk.save(attached(copy.deepcopy(base)), path.parent)
    config = json.loads(path.read_text())
    for text, word in [(json.dumps({**config, "lora_alpha": 99}), "lora_alpha"), ("{", "JSON"), ("[]", "JSON object")]:
        path.write_text(text)
        with refused(base, word):
            lk.load(base, path.parent)
    path.unlink()
    lk.load(base, path.parent)
