"""The benchmarks run, every scenario, with small sizes; no time is looked at."""

import json

import pytest

from benchmarks.reasons import REASONS
from benchmarks.speed.__main__ import PAGE, STORE
from benchmarks.speed.registry import ALL, ON_GPU, SCENARIOS
from benchmarks.speed.report import line, page, result_of, stored

RUNS = {name: (scenario, {}) for name, scenario in SCENARIOS.items()}
RUNS |= {f"{name} on cuda": (scenario, {"device": "cpu"}) for name, scenario in ON_GPU.items()}


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("name", RUNS)
def test_a_scenario_runs_and_its_arms_agree(name):
    scenario, how = RUNS[name]
    results = list(scenario.run(quick=True, **how))
    assert results
    for result in results:
        assert {result.floor, "lorakit", *result.aims()} <= set(result.values)
        assert result.case in line(result)
    kept = json.loads(json.dumps(stored(results, "cpu", "a test", 0.0)))
    assert [result_of(case) for case in kept["cases"]] == results
    assert all(result.case in page({name: kept}) for result in results)


def test_the_page_is_what_is_stored():
    kept = json.loads(STORE.read_text(encoding="utf-8"))
    assert set(kept) <= set(ALL)
    assert page(kept) == PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.speed --page"


def test_every_reason_is_of_a_scenario():
    assert set(REASONS) <= set(ALL)
