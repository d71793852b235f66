"""Seeds of every format, damaged so that they are still such files: refused, or good for all that can be done."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutate import mutate
from fuzz.readers import pack, try_one, unpack
from fuzz.seeds import seeds
from lorakit.formats import FORMATS

SEEDS = seeds()
NOT_ADAPTERS = {"empty", "text", "peft-bias"}
"""No files, and one whose config names a module that is not in it."""


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_read(name):
    found = try_one(SEEDS[name])
    assert (found == "refused") == (name in NOT_ADAPTERS)
    assert pack(unpack(SEEDS[name])) == SEEDS[name]


def test_there_are_seeds_of_every_format():
    known = {try_one(data) for data in SEEDS.values()}
    assert {*FORMATS, "checkpoint", "refused"} <= known


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SEEDS)), st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_files_are_refused_or_good_for_everything(name, seed, times):
    data, chosen = SEEDS[name], random.Random(seed)
    for _ in range(times):
        data = mutate(data, chosen)
    try_one(data)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    try_one(data)
