"""Run the scenarios, print their ratios, and store them: `python -m benchmarks.speed [--only switch llama]`."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.speed.registry import ALL, ON_GPU, SCENARIOS
from benchmarks.speed.report import line, page, stored

HERE = Path(__file__).parent.parent
STORE = HERE / "results.json"
PAGE = HERE / "RESULTS.md"


def main() -> None:
    """Run what was asked for; what was not keeps the numbers of its last run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md again, from what is stored")
    given = parser.parse_args()
    scenarios, end = (SCENARIOS, "") if given.device == "cpu" else (ON_GPU, " on cuda")
    if unknown := set(given.only or ()) - set(scenarios):
        parser.error(f"{', '.join(unknown)} is not about a GPU; there are {', '.join(scenarios)}")
    torch.set_num_threads(1)
    kept = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    if not given.page:
        command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
        for name in given.only or scenarios:
            print(f"\n{name}{end}: {scenarios[name].aim}", flush=True)
            begin, results = time.process_time(), []
            for result in scenarios[name].run():
                results.append(result)
                print(line(result), flush=True)
            kept[name + end] = stored(results, given.device, command, time.process_time() - begin)
            kept = {name: kept[name] for name in ALL if name in kept}
            STORE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
