"""Files of image models' adapters, built by their definition (LyCORIS, arXiv:2309.14859), and the ΔW that they mean."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Block(nn.Module):
    """A linear layer and a convolution, under names with underscores and dots."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0)])
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, h, w) → (n, 6, h, w)."""
        x = self.conv_in(x).movedim(1, -1)
        return (x + self.to_out[0](torch.tanh(self.to_q(x)))).movedim(-1, 1)


class Net(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])
        self.mid = nn.Conv2d(6, 4, 1)
        self.up_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, h, w) → (n, 6, h, w)."""
        return self.up_blocks[0](self.mid(self.down_blocks[0](x)))


INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(7))


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Noise, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum((i + 2) * n for i, n in enumerate(shape)))
    return (torch.randn(shape, generator=generator) * 0.4).to(dtype)


def lora(W: Tensor, r: int = 2, alpha: float | None = 1.0) -> tuple[Tensors, Tensor]:
    """Linear, or a convolution."""
    d, k, *kernel = W.shape
    down, up = rand(r, k, *kernel), rand(d, r, *(1 for _ in kernel), seed=1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    delta = torch.einsum("dr,r...->d...", up.flatten(1), down)
    if alpha is None:
        return tensors, delta
    return {**tensors, "alpha": torch.tensor(alpha)}, delta * ((alpha or r) / r)


def without_alpha(W: Tensor) -> tuple[Tensors, Tensor]:
    """The scale is 1."""
    return lora(W, alpha=None)


def zero_alpha(W: Tensor) -> tuple[Tensors, Tensor]:
    """The scale is 1."""
    return lora(W, alpha=0.0)


def tucker(W: Tensor) -> tuple[Tensors, Tensor]:
    """LoCon with a core: up·mid·down."""
    d, k, *kernel = W.shape
    down, mid, up = rand(3, k, 1, 1), rand(3, 3, *(kernel or (1, 1)), seed=2), rand(d, 3, 1, 1, seed=1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
    return tensors, 2 * torch.einsum("dp,pqxy,qi->dixy", up.flatten(1), mid, down.flatten(1)).reshape(W.shape)


def dora(W: Tensor) -> tuple[Tensors, Tensor]:
    """The magnitude of each output."""
    tensors, delta = lora(W)
    V = W + delta
    m = 0.5 + rand(W.shape[0], *(1 for _ in W.shape[1:])).abs()
    norms = V.flatten(1).norm(dim=1).reshape(m.shape)
    return {**tensors, "dora_scale": m}, m * V / norms - W


def loha(W: Tensor) -> tuple[Tensors, Tensor]:
    """Two products, entry by entry."""
    d, k = W.flatten(1).shape
    names = [f"hada_w{i}_{end}" for i in (1, 2) for end in "ab"]
    shapes = [(d, 2), (2, k), (d, 2), (2, k)]
    t = {name: rand(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * 2
    return {**t, "alpha": torch.tensor(4.0)}, delta.reshape(W.shape)


def loha_tucker(W: Tensor) -> tuple[Tensors, Tensor]:
    """With cores."""
    d, k, *kernel = W.shape
    t = {f"hada_t{i}": rand(2, 2, *kernel, seed=i) for i in (1, 2)}
    t |= {f"hada_w{i}_a": rand(2, d, seed=i) for i in (1, 2)} | {f"hada_w{i}_b": rand(2, k, seed=i) for i in (1, 2)}
    products = [torch.einsum("pqxy,qi,pd->dixy", t[f"hada_t{i}"], t[f"hada_w{i}_b"], t[f"hada_w{i}_a"]) for i in (1, 2)]
    return {**t, "alpha": torch.tensor(1.0)}, products[0] * products[1] / 2


def _lokr(W: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    return torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2).reshape(W.shape) * scale


def lokr_whole(W: Tensor) -> tuple[Tensors, Tensor]:
    """Both whole: alpha counts for nothing."""
    d, k, *kernel = W.shape
    w1, w2 = rand(2, 2), rand(d // 2, k // 2, *kernel, seed=1)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(float(max(1, -(-max(w2.shape[:2]) // 2))))}, _lokr(
        W, w1, w2, 1.0
    )


def lokr(W: Tensor) -> tuple[Tensors, Tensor]:
    """W₂ as two factors, and W₁ no square: each side has a split of its own."""
    d, k, *kernel = W.shape
    w1 = rand(2, 1)
    a, b = rand(d // 2, 1, seed=1), rand(1, W.numel() // d, seed=2)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(0.5)}
    return tensors, _lokr(W, w1, (a @ b).reshape(d // 2, k, *kernel), 0.5)


def lokr_both(W: Tensor) -> tuple[Tensors, Tensor]:
    """Both as two factors."""
    d, k, *kernel = W.shape
    t = {"lokr_w1_a": rand(d // 2, 1), "lokr_w1_b": rand(1, k // 2), "lokr_w2": rand(2, 2, *kernel)}
    return {**t, "alpha": torch.tensor(3.0)}, _lokr(W, t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2"], 3.0)


def lokr_tucker(W: Tensor) -> tuple[Tensors, Tensor]:
    """W₂ with a core."""
    d, k, *kernel = W.shape
    t = {
        "lokr_w1": rand(2, 2),
        "lokr_t2": rand(1, 1, *kernel),
        "lokr_w2_a": rand(1, d // 2),
        "lokr_w2_b": rand(1, k // 2),
    }
    w2 = torch.einsum("pqxy,qi,pd->dixy", t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"]).contiguous()
    return {**t, "alpha": torch.tensor(2.0)}, _lokr(W, t["lokr_w1"], w2, 2.0)


def diff(W: Tensor) -> tuple[Tensors, Tensor]:
    """ΔW itself."""
    delta = rand(*W.shape)
    return {"diff": delta}, delta


METHODS = {f.__name__: f for f in (lora, without_alpha, zero_alpha, dora, loha, lokr_whole, lokr, diff)}
"""Of any weight."""
OF_KERNELS = {f.__name__: f for f in (tucker, loha_tucker, lokr_tucker)}
"""Of convolutions over more than one pixel."""
KEPT = ("lora", "dora", "loha", "lokr_whole", "lokr")
"""What a file holds and is written as it is."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Layer → W, of all layers but one."""
    return {
        name.removesuffix(".weight"): p.detach()
        for name, p in model.named_parameters()
        if name.endswith(".weight") and not name.startswith("mid")
    }


def made(model: nn.Module, method: Any) -> tuple[dict[str, Tensors], dict[str, Tensor]]:
    """For every weight the tensors and ΔW; of a linear layer, methods of kernels are plain LoRA."""
    tensors, deltas = {}, {}
    for layer, W in weights_of(model).items():
        own = lora if method.__name__ in OF_KERNELS and W.dim() == 2 else method
        tensors[layer], deltas[f"{layer}.weight"] = own(W)
    return tensors, deltas


def kohya(parts: dict[str, Tensors], prefix: str = "lora_unet_") -> Tensors:
    """One file of several weights."""
    return {f"{prefix}{layer.replace('.', '_')}.{end}": t for layer, each in parts.items() for end, t in each.items()}


def write_file(path: Path, tensors: Tensors, **metadata: Any) -> Path:
    """A file of these tensors."""
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, text or None)
    return path


def content(path: Path) -> Tensors:
    """The tensors of a file, by key in order."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}
