"""FSDP2, a model adapted and then sharded over processes: `torchrun --nproc-per-node 2 examples/fsdp2.py`.

The losses are those of one process; the adapter alone is saved, whole, and loads where there is one process.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", default=f"{tempfile.gettempdir()}/fsdp2", help="a directory for the adapter")
out = Path(parser.parse_args().out)  # the same in all processes
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
alone, fresh = copy.deepcopy(model), copy.deepcopy(model)
for each in (model, alone):
    torch.manual_seed(1)
    lk.attach(each, lk.LoRA(rank=8), name="python")
for layer in (*model.model.layers, model):
    fully_shard(layer)
text = torch.tensor(list(Path(tempfile.__file__).read_bytes()))
batches = text[: 30 * 4 * 64].view(30, 4, 64)  # 30 steps of 4 rows


def train(model: nn.Module, rows: slice) -> Tensor:
    """The loss of each step on these rows of each batch."""
    optimizer, losses = torch.optim.AdamW(lk.adapter_parameters(model), lr=5e-3), []
    for batch in batches[:, rows]:
        optimizer.zero_grad()
        losses.append(model(input_ids=batch, labels=batch).loss)
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


losses = train(model, slice(rank, None, world)) / world
dist.all_reduce(losses)
lk.save(model, out / "python.safetensors")  # called in every process, written by the first
lk.load(fresh, out / "python.safetensors")
difference = (losses - train(alone, slice(None))).abs().max()
print(f"process {rank} of {world}: loss {losses[0]:.6f} … {losses[-1]:.6f}, within {difference:.0e} of one process's")
assert difference < 1e-5 and torch.allclose(model(batches[0]).logits, fresh(batches[0]).logits, atol=1e-5)
dist.destroy_process_group()
