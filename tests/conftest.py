"""Shared set-up: one thread for each test process, as several run side by side; a small base and a saved adapter."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
from pathlib import Path

import pytest
import torch
from helpers import attached
from kinds import mlp

import lorakit as lk

torch.set_num_threads(1)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return mlp()


@pytest.fixture
def saved(base, tmp_path) -> Path:
    """One file with an adapter for `base`."""
    path = tmp_path / "saved.safetensors"
    lk.save(attached(copy.deepcopy(base)), path)
    return path
