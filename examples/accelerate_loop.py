"""accelerate on a model adapted in place, in one process or several: its states hold the adapter, not the base.

A run continued from a saved state ends in the same bits as one that was never stopped.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the states")
given = parser.parse_args().out
first = PartialState(cpu=True).is_main_process
out = Path(broadcast_object_list([(given or tempfile.mkdtemp()) if first else None])[0])  # one for all processes


def train(start: int, end: int) -> list[Tensor]:
    """An adapter that learns to be another network, from the start or from a saved state."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512)) for _ in range(2))
    x = torch.randn(1024, 64)
    base = set(model.state_dict())
    lk.attach(model, lk.LoRA(rank=16, dropout=0.05))
    optimizer = torch.optim.AdamW(lk.adapter_parameters(model), lr=3e-3)
    loader = DataLoader(TensorDataset(x, other(x).detach()), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def leave_out_the_base(models, weights, folder):
        weights[0] = {key: value for key, value in weights[0].items() if key.removeprefix("module.") not in base}

    accelerator.register_save_state_pre_hook(leave_out_the_base)
    if start:
        accelerator.load_state(out / f"epoch-{start}", strict=False)
    for epoch in range(start, end):
        loader.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {accelerator.reduce(loss.detach(), 'mean'):.4f}")
        accelerator.save_state(out / f"epoch-{epoch + 1}")
    return lk.adapter_parameters(model)


whole, continued = train(0, 6), train(3, 6)
assert all(torch.equal(a, b) for a, b in zip(whole, continued, strict=True))
size = (out / "epoch-6" / "model.safetensors").stat().st_size
print(f"equal to the bit; the weights of a state: {size:,} bytes, the base: {4 * (64 * 512 + 512 * 512 + 1024):,}")
