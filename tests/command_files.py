"""What the tests of commands share: running them, and files to run them on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import lorakit as lk
from lorakit.cli import app
from lorakit.errors import LorakitError
from lorakit.variants import LoRA

HEADS = ("--heads", "4", "--kv-heads", "2", "--arch", "llama")


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments: object, env: dict[str, str] | None = None) -> str:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(message: str, *arguments: object) -> None:
    with pytest.raises(LorakitError, match=message):
        run(*arguments)


def started(*arguments: object, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def outside(*arguments: object, **how) -> tuple[int, str, str]:
    process = started(*arguments, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def made(folder: Path) -> Path:
    """A sharded Llama, a GPT-2 of one file, the Llama tuned, and two adapters of the Llama."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "llama", max_shard_size="40KB")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    for seed, name in enumerate(("a", "b=0.5")):
        lk.attach(model, LoRA(rank=4 + seed), targets=["q_proj", "v_proj"], name="mine")
        randomize(model, "mine", seed=seed + 1)
        lk.save(model, folder / name, name="mine")
        lk.detach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned", max_shard_size="40KB")
    return folder


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def picture(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
