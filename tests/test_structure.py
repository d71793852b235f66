"""Importing is light, and the parts of the package know only those below them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

PACKAGE = Path(lorakit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = [
    {"errors", "untouched", "safe"},
    {"tables", "untrusted", "mistaken"},
    {"layers", "algebra"},
    {"variants"},
    {"state", "storage", "fingerprint"},
    {"index"},
    {"patterns"},
    {"change", "suitable", "header"},
    {"values", "targets"},
    {"plan", "peft", "switch"},
    {"native"},
    {"evidence", "resident", "loading", "padding", "probe", "sums", "flat"},
    {"attach", "merge", "budget", "combine"},
    {"checkpoints"},
    {"formats"},
    {"files", "exchange"},
    {"digits", "finetune"},
    {"cli"},
    {"__main__"},
]
"""The parts of the package from the ground up: each may import those before it, and itself."""


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """The part a file belongs to: its folder, or its own name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file names in its import statements, wherever they stand."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            modules.append(node.module)
            if node.module == "lorakit":
                modules += [f"lorakit.{alias.name}" for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("lorakit.")}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != PACKAGE or path.stem != "__init__"], ids=name_of
)
def test_imports_go_one_way(path):
    part = part_of(path)
    level = next(i for i, parts in enumerate(ORDER) if part in parts)
    assert imported_parts(path) <= {part}.union(*ORDER[:level])


def test_the_order_names_every_part_and_no_other():
    assert {part_of(path) for path in FILES} - {"__init__"} == set().union(*ORDER)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


def test_the_public_names_are_all_there_and_documented():
    assert sorted(lorakit.__all__, key=str) == lorakit.__all__
    for name in lorakit.__all__:
        assert getattr(lorakit, name).__doc__, name


NEW_MODULES = """
import json, sys
import torch
before = set(sys.modules)
import lorakit
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""

SHARE = """
import time
begin = time.process_time()
import torch
middle = time.process_time()
import lorakit
print((time.process_time() - middle) / (middle - begin))
"""


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_loads_only_torch_safetensors_and_the_standard_library():
    new = set(json.loads(fresh_python(NEW_MODULES)))
    assert "lorakit" in new
    assert new - {"lorakit", "safetensors", "torch"} <= sys.stdlib_module_names


def test_importing_adds_little_to_the_time_of_torch():
    # A share of torch's own time: seconds are longer when other work fills the machine.
    assert min(float(fresh_python(SHARE)) for _ in range(3)) < 0.22
