"""Runs that are killed at random moments, and go on to the same adapter.

    python tests/killed.py --times 50                   # in PLACE, a temporary directory
    python tests/killed.py --times 50 --model DIR       # another base

A run is made without being disturbed. Then the same one is begun, killed with SIGKILL at a random moment (often while
it writes, since a checkpoint is made at every step), continued with `resume=auto`, killed again, and so on. After each
kill every checkpoint in the directory must be whole to the byte, or absent; at each end the adapter must be that of the
undisturbed run, to the bit.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has no threads of the process that it was made from

from runs import run
from small_lms import small_lm

from lorakit.errors import LorakitError
from lorakit.finetune.training import checkpoints, engine, report  # so that no fork has to import them  # noqa: F401
from lorakit.finetune.training.record import read_metrics


def started(model: Path, folder: Path, **values: Any) -> int:
    """A process that trains: a fork of this one, which has imported everything."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore")
        run(model, folder, **values)
        code = 0
    except LorakitError as error:
        print(f"refused: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def waited(child: int) -> int | None:
    """The signal that ended it, or None if it ended well."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise AssertionError("a run that was to go on ended with an error")
    return None


def check_whole(run_directory: Path) -> int:
    """How many checkpoints there are; each is as it was written."""
    found = checkpoints.checkpoints_in(run_directory / "checkpoints")
    for path in found:
        assert checkpoints.damage(path) is None, f"{path}: {checkpoints.damage(path)}"
    read_metrics(run_directory / "metrics.jsonl")
    return len(found)


def killed(model: Path, folder: Path, times: int, seed: int, **values: Any) -> list[int]:
    """Kill runs so often, and check each; the steps at which they were killed."""
    choose = random.Random(seed)
    values = {
        "steps": 16,
        "save_every": 1,
        "eval_every": 4,
        "dropout": 0.1,
        "accumulation": 2,
        "keep_last": 3,
        **values,
    }
    whole = folder / "whole"
    whole.mkdir(parents=True)
    begun = time.perf_counter()
    assert waited(started(model, whole, **values)) is None
    usual = time.perf_counter() - begun
    expected = (whole / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    place, steps, ends = folder / "killed", [], 0
    place.mkdir()
    while len(steps) < times:
        child = started(model, place, resume="auto", **values)
        time.sleep(choose.uniform(0.0, usual))
        os.kill(child, signal.SIGKILL)
        if waited(child) is not None:
            check_whole(place / "run")
            found, _ = checkpoints.newest(place / "run" / "checkpoints")
            steps.append(0 if found is None else checkpoints.step_of(found))
            continue
        ends += same(place, expected)
    if waited(started(model, place, resume="auto", **values)) is None:
        ends += same(place, expected)
    print(
        f"killed {len(steps)} times, with {len(set(steps))} newest checkpoints; {ends} runs ended, all to the same bits"
    )
    return steps


def same(place: Path, expected: bytes) -> int:
    """A run that ended is that which was never disturbed; the next one begins anew."""
    made = (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert made == expected, "the adapter differs from that of the run that was not disturbed"
    shutil.rmtree(place / "run")
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = options.model or small_lm(place / "model")
        killed(model, place / "runs", options.times, options.seed)


if __name__ == "__main__":
    main()
