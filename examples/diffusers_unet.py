"""A UNet and a transformer (SD3's) of diffusers, built small, learn to take the noise off handwritten threes.

What the UNet learns is written as kohya's tools do, what the transformer learns as diffusers does, and loads again.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the adapters")
out = Path(parser.parse_args().out or tempfile.mkdtemp())
torch.manual_seed(0)
digits = load_digits()
threes = torch.tensor(digits.images[digits.target == 3], dtype=torch.float32)[:32, None] / 8 - 1
threes = threes.expand(-1, 4, -1, -1)  # (32, 4, 8, 8), with the channels of latents
words = torch.randn(4, 32).expand(32, -1, -1)

types = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
sizes = {"block_out_channels": (16, 32), "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8}
unet = UNet2DConditionModel(8, **types, **sizes)
heads = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "caption_projection_dim": 64}
sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "out_channels": 4}
transformer = SD3Transformer2DModel(8, 2, 4, **heads, **sizes)


def adapt(model: nn.Module, format: str, part: str, **text: Tensor) -> None:
    """Train on the way from pictures to noise, as flow matching does; write; load onto a fresh copy."""
    fresh, losses = copy.deepcopy(model), []
    lk.attach(model, lk.LoRA(rank=4), [nn.Linear, nn.Conv2d], name="threes")
    optimizer = torch.optim.AdamW(lk.adapter_parameters(model), lr=5e-3)
    for _ in range(30):
        noise, time = torch.randn(threes.shape), torch.rand(32)
        noisy = torch.lerp(threes, noise, time.view(-1, 1, 1, 1))
        direction = model(noisy, timestep=1000 * time, **text).sample
        losses.append(nn.functional.mse_loss(direction, noise - threes))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    lk.write(lk.adapter_value(model), file := out / f"{format}.safetensors", format, part=part)
    lk.load(fresh, file, part=part)
    assert torch.equal(*(each(noisy, timestep=1000 * time, **text).sample for each in (model, fresh)))
    assert losses[-1] < 0.9 * losses[0]
    print(f"{part}: loss {losses[0]:.3f} before, {losses[-1]:.3f} after; {file}: {file.stat().st_size:,} bytes")


adapt(unet, "kohya", "unet", encoder_hidden_states=words)
adapt(transformer, "diffusers", "transformer", encoder_hidden_states=words, pooled_projections=words[:, 0])
