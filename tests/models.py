"""The small models that the laws run over, and their inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block: norm, buffer, two projections, inputs of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x) + self.shift)))


class Reader(nn.Module):
    """Reads its own parameter; no layer of its own is called with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.table).relu())


class Experts(nn.Module):
    """One weight of three axes: (expert, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.weight)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, whose fused function is handed both of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    """Queries, keys and values of three sizes: a projection of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False)[0]


class PaddedEncoder(nn.Module):
    """Two encoder layers and sequences of several lengths, which torch may hand over as nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        return y.masked_fill(padding.unsqueeze(-1), 0.0)  # what stands there depends on the path


class Steps(nn.Module):
    """A cell called twice, the second time with the state from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[1], self.cell(x[0]))[0]


class Tied(nn.Module):
    """An output layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def mlp() -> nn.Sequential:
    """The smallest model that most single tests use: inputs (…, 6), outputs (…, 4)."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def shared() -> nn.Sequential:
    """One linear layer under two names."""
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def encoder() -> nn.Module:
    """A layer that has a fused inference path."""
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def decoder() -> nn.Module:
    """Self-attention, cross-attention and a feed-forward layer."""
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerDecoder(layer, 1)


def projected_lstm() -> nn.Module:
    """Twelve matrices."""
    return nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3)


def sentences() -> tuple[Tensor, ...]:
    """Two sequences, the second one with padding."""
    return torch.randn(2, 3, 8), torch.tensor([[False, False, False], [False, False, True]])


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of normal noise."""
    return lambda: (torch.randn(shape),)


def tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of indices below 7, 0 and 1 among them."""

    def make() -> tuple[Tensor, ...]:
        indices = torch.randint(0, 7, shape)
        indices.view(-1)[:2] = torch.tensor([0, 1])
        return (indices,)

    return make


def padded() -> tuple[Tensor, ...]:
    """Indices below 7, 2 and 5 several times among them."""
    return (torch.tensor([[2, 5, 1], [5, 2, 5]]),)
