"""The story from end to end: a base, its data, an adapter for SQL and one for JavaScript, and full fine-tuning beside.

python -m examples.sql_and_javascript --out runs/story              # about ten minutes on two cores
python -m examples.sql_and_javascript --model DIR --tune            # on a model of yours
python -m examples.sql_and_javascript --quick                       # a minute; it learns little
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.sql_and_javascript.settings import DEFAULT, QUICK, Plan
from lorakit.errors import LorakitError

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FILES = {"sql": "sql", "js": "javascript"}
"""What each task's configuration and folders are called."""


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.sql_and_javascript", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/story"), help="a folder for all that comes of it")
    parser.add_argument("--model", help="a causal language model's directory, in place of the small one made here")
    parser.add_argument("--quick", action="store_true", help="a small base, few steps: for tests")
    parser.add_argument("--tune", action="store_true", help="try learning rates on validation data first")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--length", type=int, help="tokens of a pair at most; longer ones are left out")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    plan = QUICK if given.quick else DEFAULT
    plan = replace(plan, seed=given.seed, steps=given.steps or plan.steps, length=given.length or plan.length)
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of `lorakit train` too
    try:
        story = tell(plan, given.out, given.model, tune=given.tune)
    except LorakitError as error:
        sys.exit(f"error: {error}")
    if not story["holds"]:
        sys.exit("error: what must hold does not; see above")


def tell(
    plan: Plan, out: Path, model: str | None = None, *, tune: bool = False, say: Callable[[str], None] | None = None
) -> Mapping[str, Any]:
    """Do everything, and write it into `out`.

    Args:
        plan: sizes, steps and learning rates.
        out: a folder; it is made.
        model: a causal language model's directory; None is the small base of the plan.
        tune: whether to try the plan's learning rates first.
        say: what is told of each line; by default it is printed.

    Returns:
        What `results.json` holds.

    Raises:
        LorakitError: a step failed.
    """
    from lorakit.finetune.quiet import quiet_imports

    quiet_imports()
    import torch

    from examples.sql_and_javascript.telling import Teller

    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.perf_counter()
    teller = Teller(plan, out, model, SHARED, _printed if say is None else say)
    results = teller.tell(tune)
    teller.say(f"{out / 'report.md'} and {out / 'results.json'}; {time.perf_counter() - start:.0f} s")
    return results


def _printed(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
