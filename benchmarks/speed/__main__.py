"""Run the scenarios, print their ratios, and store them: `python -m benchmarks.speed [--only switch]`."""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.scenarios import SCENARIOS
from benchmarks.speed.timing import Result

HERE = Path(__file__).parent.parent
STORE = HERE / "results.json"


def lines(results: dict[str, list[dict[str, object]]]) -> str:
    """A table for each scenario."""
    text = ""
    for name, cases in results.items():
        text += f"\n## {name}\n\n{(SCENARIOS[name].__doc__ or '').strip()}\n\n"
        for raw in cases:
            result = Result(**raw)  # type: ignore[arg-type]
            ratios = ", ".join(f"{arm} {result.ratio(arm):.3g}" for arm in result.values if arm != result.floor)
            reached = "" if result.aim is None else f"; aim {result.aim:.3g}"
            mark = "" if result.aim is None else (" ✓" if result.ratio("lorakit") <= result.aim else " ✗")
            text += (
                f"- {result.case}: {result.floor} {result.values[result.floor] * 1e6:.4g} µs; {ratios}{reached}{mark}\n"
            )
    return text


def page(stored: dict[str, Any]) -> str:
    """All that is stored, and what is not measured."""
    machine = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    return (
        "# What adapters cost\n\nCPU time of one thread, arms interleaved in one process, least of several rounds, as "
        f"ratios to the floor.\nLast run: {machine}. No GPU was at hand.\n\nNot measured yet: a step of the digits "
        "network, merged inference, an adapter for each row,\nthe optimizer's step, bytes kept for backward, combining "
        "adapters, growth with rank, layers and tokens;\nPEFT's loading and attaching; loralib.\n"
        + lines(stored["scenarios"])
    )


def main() -> None:
    """Run what was asked for; what was not keeps the numbers of its last run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=list(SCENARIOS), action="append")
    chosen = parser.parse_args().only or list(SCENARIOS)
    torch.set_num_threads(1)
    stored = json.loads(STORE.read_text()) if STORE.exists() else {"scenarios": {}}
    for name in chosen:
        cases = []
        for result in SCENARIOS[name]():
            cases.append(vars(result))
            print(lines({name: cases[-1:]}).splitlines()[-1], flush=True)
        stored["scenarios"][name] = cases
    stored["machine"] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.machine(),
        "command": "python -m benchmarks.speed " + " ".join(sys.argv[1:]),
    }
    stored["scenarios"] = {name: stored["scenarios"][name] for name in SCENARIOS if name in stored["scenarios"]}
    STORE.write_text(json.dumps(stored, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(page(stored))


if __name__ == "__main__":
    main()
