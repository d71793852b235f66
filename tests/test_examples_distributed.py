"""The example of FSDP2, with torchrun as its readers start it: two processes give the losses of one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def torchrun(processes: int, script: str, folder: Path, *, out: bool = True) -> str:
    """What it prints. The port is one that is free; the network stays on this machine."""
    words = ["--standalone", "--nproc-per-node", str(processes), str(EXAMPLES / script)]
    words += ["--out", str(folder)] if out else []
    own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    own |= {} if out else {"TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=folder,
        env=own,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_under_fsdp2_train_as_one(tmp_path):
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        printed = torchrun(processes, "fsdp2.py", folder)
        found = re.findall(r"process (\d) of (\d): loss ([\d.]+) … ([\d.]+), within (\S+) of one process's", printed)
        assert sorted(rank for rank, *_ in found) == [str(rank) for rank in range(processes)], printed
        assert all(int(world) == processes and float(difference) < 1e-5 for _, world, *_, difference in found)
        assert len({tuple(values) for _, _, *values, _ in found}) == 1  # the same in every process
        losses[processes] = [float(loss) for loss in found[0][2:4]]
        assert [path.name for path in folder.iterdir()] == ["python.safetensors"]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert abs(one - two) < 1e-5
    assert losses[1][1] < losses[1][0] - 1
    one, two = (load_file(tmp_path / str(processes) / "python.safetensors") for processes in (1, 2))
    assert list(one) == list(two) and all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_two_processes_under_accelerate_continue_to_the_same_bits(tmp_path):
    printed = torchrun(2, "accelerate_loop.py", tmp_path)
    assert printed.count("equal to the bit") == 2


def test_two_processes_under_accelerate_share_a_directory_that_nobody_named(tmp_path):
    printed = torchrun(2, "accelerate_loop.py", tmp_path, out=False)
    assert printed.count("equal to the bit") == 2
    (states,) = {path.parents[1] for path in tmp_path.rglob("epoch-6/model.safetensors")}
    assert {path.name for path in states.iterdir()} == {f"epoch-{i}" for i in range(1, 7)}
