"""A whole checkpoint takes no more memory than its largest layer does, and what is killed half-way leaves nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.checkpoints.extracting import extract
from lorakit.checkpoints.merging import merge_checkpoint

PEAK = """
import resource, sys, time
import torch, lorakit
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, seconds)
"""

EXTRACT = """
from lorakit.checkpoints.extracting import extract
adapter, report = extract("{base}", "{tuned}", rank=8)
assert report.error < 0.05, report.error
lorakit.write(adapter, "{adapter}")
"""

MERGE = """
from lorakit.checkpoints.merging import merge_checkpoint
report = merge_checkpoint("{base}", lorakit.read("{adapter}"), "{out}", least_survival=0)
"""

LAYERS = 8
SHAPES = {
    "model.embed_tokens.weight": (32768, 2048),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (2048, 2048),
            "self_attn.v_proj": (2048, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (5632, 2048),
            "mlp.up_proj": (5632, 2048),
            "mlp.down_proj": (2048, 5632),
            "input_layernorm": (2048,),
        }.items()
    },
    "lm_head.weight": (32768, 2048),
}
LARGEST = 32768 * 2048 * 2


def build(base: Path, tuned: Path) -> int:
    """Two checkpoints of four shards in bfloat16, a change of rank 4 apart; the bytes of one."""
    generator = torch.Generator().manual_seed(0)
    names, total = list(SHAPES), 0
    base.mkdir()
    tuned.mkdir()
    for i in range(4):
        shard, changed = {}, {}
        for name in names[i * len(names) // 4 : (i + 1) * len(names) // 4]:
            shape = SHAPES[name]
            weight = torch.randn(shape, generator=generator)
            delta = torch.full(shape, 0.1)
            if len(shape) == 2:
                B, A = (torch.randn(size, generator=generator) for size in ((shape[0], 4), (4, shape[1])))
                delta = B @ A
            shard[name] = weight.bfloat16()
            changed[name] = (weight + delta).bfloat16()
            total += shard[name].nbytes
        save_file(shard, base / f"model-{i + 1:05}-of-00004.safetensors", {"format": "pt"})
        save_file(changed, tuned / f"model-{i + 1:05}-of-00004.safetensors", {"format": "pt"})
    return total


def peak(work: str) -> tuple[int, float]:
    """The largest resident size of a fresh process in bytes, and its seconds."""
    code = PEAK.format(work=work)
    # By way of a shell, which forks: a child of this process itself would begin with this one's peak for its own.
    command = ["sh", "-c", 'OMP_NUM_THREADS= ; unset OMP_NUM_THREADS; "$0" -c "$1"; exit $?', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kilobytes, seconds = done.stdout.split()[-2:]
    return int(kilobytes) * 1024, float(seconds)


@pytest.mark.slow
def test_the_largest_layer_bounds_the_memory(tmp_path):
    total = build(tmp_path / "base", tmp_path / "tuned")
    names = {name: tmp_path / name for name in ("base", "tuned", "out")} | {"adapter": tmp_path / "a.safetensors"}
    alone, _ = peak("")
    print(f"\n{total / 1e9:.2f} GB; largest {LARGEST / 1e6:.0f} MB; imports alone {alone / 1e6:.0f} MB")
    for what, work in (("extract", EXTRACT), ("merge", MERGE)):
        most, seconds = peak(work.format(**names))
        above = most - alone
        print(f"{what}: {above / 1e6:.0f} MB above, {(above - 300e6) / LARGEST:.2f} layers + 300 MB, {seconds:.1f} s")
        assert above < 3 * LARGEST + 300e6, what
    assert sorted(os.listdir(names["out"])) == sorted(os.listdir(names["base"]))


KILLED = """
import os, random, signal, time
import lorakit
from lorakit.checkpoints.merging import merge_checkpoint

adapter = lorakit.read("{adapter}")
random.seed(0)
for i in range({times}):
    child = os.fork()
    if not child:
        slow = lambda done, total, name: time.sleep(0.002)
        merge_checkpoint("{base}", adapter, "{out}", least_survival=0, progress=slow)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(os.path.exists("{out}"), [name for name in os.listdir("{parent}") if name.startswith(".")], flush=True)
    if os.path.exists("{out}"):
        import shutil
        shutil.rmtree("{out}")
"""


def small(path: Path, seed: int = 0) -> Path:
    """A checkpoint of three shards."""
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(3):
        tensors = {f"layer{i}.{j}.weight": torch.randn(64, 64, generator=generator) for j in range(8)}
        save_file(tensors, path / f"model-{i}.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_what_is_killed_leaves_nothing_and_the_next_cleans_up(tmp_path):
    base, tuned = small(tmp_path / "base"), small(tmp_path / "tuned", seed=1)
    names = {
        "base": base,
        "out": tmp_path / "to" / "out",
        "parent": tmp_path / "to",
        "adapter": tmp_path / "a.safetensors",
    }
    names["parent"].mkdir()
    adapter, _ = extract(base, tuned, rank=1)
    lk.write(adapter, names["adapter"])
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(times=12, **names)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert any(".partial" in line for line in lines), "none was killed half-way"
    assert all(line.count(".partial") <= 1 for line in lines), "the next one takes away what the last left"
    merge_checkpoint(base, adapter, names["out"], least_survival=0)
    assert os.listdir(names["parent"]) == ["out"]
    wanted = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    got = {name: tensor for file in names["out"].glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert list(sorted(got)) == list(sorted(wanted))
