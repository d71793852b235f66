"""Runs killed at random moments go on to the same bits: `killed.py`, which says how, a few times and many times."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no SIGKILL")
@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_go_on(times):
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run([sys.executable, script, "--times", str(times)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"killed {times} times" in done.stdout and "to the same bits" in done.stdout
