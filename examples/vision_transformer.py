"""A vision transformer (transformers' ViT) that knows upright digits learns to read them lying on their side.

LoRA in its blocks, and a classifier trained whole beside it: one adapter, saved and switched as one.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the adapter")
file = Path(parser.parse_args().out or tempfile.mkdtemp()) / "lying.safetensors"
torch.manual_seed(0)
digits = load_digits()
upright, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
lying = upright.rot90(1, (2, 3))  # (1797, 1, 8, 8)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size))


def train(parameters: list[nn.Parameter], images: Tensor, epochs: int) -> None:
    """On the first 1,400."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            model.train()(images[batch], labels=labels[batch]).loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(images: Tensor) -> float:
    """On the others."""
    return (model.eval()(images[1400:]).logits.argmax(-1) == labels[1400:]).float().mean().item()


train(list(model.parameters()), upright, epochs=8)
before = accuracy(upright), accuracy(lying)
lk.attach(model, lk.LoRA(rank=8), train_also=["classifier"], name="lying")
train(lk.adapter_parameters(model), lying, epochs=8)
after = accuracy(lying)
lk.save(model, file)

print(f"upright digits: {before[0]:.1%} right; lying ones: {before[1]:.1%} before, {after:.1%} after")
print(f"trained: {lk.adapters(model)['lying'].parameters:,} parameters; {file}: {file.stat().st_size:,} bytes")
with lk.disabled(model):  # the classifier too is the base's own
    assert (accuracy(upright), accuracy(lying)) == before
lk.detach(model)
lk.load(model, file)
assert accuracy(lying) == after > before[1] + 0.5
