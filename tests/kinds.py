"""The one place where kinds of layers and variants are listed: every law runs over all of them.

A new kind of layer is one more `Case`, a new variant one more entry of `VARIANTS`. The matrix of pairs is made of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import (
    Block,
    CrossAttention,
    Experts,
    PaddedEncoder,
    Reader,
    SelfAttention,
    Steps,
    Tied,
    decoder,
    encoder,
    floats,
    mlp,
    padded,
    projected_lstm,
    sentences,
    shared,
    tokens,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, LoRAFA, Rows, VeRA
from lorakit.variants import Variant


@dataclass(frozen=True)
class Case:
    """A small model and the weights to adapt in it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    targets: Any = "all-linear"
    mode: Any = "auto"
    leaves_fused_path: bool = False
    """A hook makes torch leave its fused inference path: equal to precision there, not to the bit."""
    compiles: bool = True
    """Whether torch.compile takes the bare model in one graph."""
    functional: bool = True
    """Whether torch.func.functional_call leaves the bare model as it was: it does not restore a shared module."""
    batches: bool = True
    """Whether torch.func.vmap takes the bare model."""
    twice: bool = True
    """Whether torch differentiates the bare model twice."""
    either: bool = False
    """Whether it is in the weight by default though it could sit beside the call."""
    rounding: float = 1.0
    """How much wider the tolerance is: each of several layers in a row rounds."""
    rewrites: bool = False
    """Whether the bare model's own forward writes into its weight, as `max_norm` does."""

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its inputs, the same for the same seed."""
        torch.manual_seed(seed)
        model = self.make().to(dtype)
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())
        for _ in range(50 if self.rewrites else 0):  # until it finds nothing more to do
            model(*inputs)
        return model, inputs

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of `attach` that choose the weights."""
        return {"targets": self.targets, "mode": self.mode}


_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvNd

CASES = [
    Case("linear", mlp, floats(3, 6)),
    Case("linear-weight", mlp, floats(3, 6), mode="weight"),
    Case("linear-3d-input", Block, floats(2, 3, 6), ["up", "down"]),
    Case("linear-3d-input-weight", Block, floats(2, 3, 6), ["up", "down"], mode="weight"),
    Case("linear-no-bias", lambda: nn.Sequential(nn.Linear(6, 5, bias=False)), floats(3, 6), "0"),
    Case("root-linear", lambda: nn.Linear(6, 5), floats(3, 6)),
    Case("root-parameter", lambda: nn.Linear(6, 5), floats(3, 6), "weight"),
    Case("shared-linear", shared, floats(3, 6), functional=False),
    Case("tied-head", Tied, tokens(2, 3), "head"),
    Case("parameter", Reader, floats(3, 6), "table"),
    Case("parameter-3d", Experts, floats(3, 6), "weight"),
    Case("embedding", lambda: nn.Sequential(nn.Embedding(7, 6)), tokens(2, 3), "0"),
    Case("embedding-weight", lambda: nn.Sequential(nn.Embedding(7, 6)), tokens(2, 3), "0.weight"),
    Case("embedding-padding", lambda: nn.Sequential(nn.Embedding(7, 6, padding_idx=2)), padded, "0"),
    Case("embedding-norm", lambda: nn.Embedding(7, 6, max_norm=1.5), tokens(2, 3), nn.Embedding, rewrites=True),
    Case("embedding-frequency", lambda: nn.Embedding(7, 6, scale_grad_by_freq=True), padded, nn.Embedding),
    Case("bag-mean", lambda: nn.EmbeddingBag(7, 6), tokens(2, 3), nn.EmbeddingBag, batches=False, twice=False),
    Case(
        "bag-sum",
        lambda: nn.EmbeddingBag(7, 6, mode="sum", padding_idx=2, include_last_offset=True),
        lambda: (torch.tensor([0, 2, 2, 5, 1]), torch.tensor([0, 3, 5]), torch.randn(5)),
        nn.EmbeddingBag,
        batches=False,
        twice=False,
    ),
    Case(
        "bag-max", lambda: nn.EmbeddingBag(7, 6, mode="max"), tokens(2, 3), nn.EmbeddingBag, batches=False, twice=False
    ),
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=1)), floats(2, 3, 7), "0"),
    Case("conv2d", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), floats(2, 3, 5, 5), "0"),
    Case("conv2d-weight", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), floats(2, 3, 5, 5), "0.weight"),
    Case("conv2d-same", lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=2), floats(2, 3, 6, 5), nn.Conv2d),
    Case("conv2d-circular", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), floats(2, 3, 5, 5), _CONV),
    Case(
        "conv1d-reflect",
        lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="reflect", dilation=2),
        floats(2, 3, 7),
        _CONV,
    ),
    Case(
        "conv3d-replicate",
        lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"),
        floats(2, 2, 3, 3, 3),
        _CONV,
    ),
    Case("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), floats(2, 4, 5, 5), _CONV),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), floats(2, 4, 5, 5), _CONV),
    Case("conv1d-unbatched", lambda: nn.Conv1d(3, 4, 3), floats(3, 7), _CONV),
    Case("conv-transpose1d", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), floats(2, 3, 5), _TRANSPOSED),
    Case(
        "conv-transpose2d",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        floats(2, 4, 3, 3),
        _TRANSPOSED,
    ),
    Case("conv-transpose3d", lambda: nn.ConvTranspose3d(2, 3, 2), floats(2, 2, 3, 3, 3), _TRANSPOSED),
    Case("bilinear", lambda: nn.Bilinear(4, 3, 5), lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 3)), nn.Bilinear),
    Case("transposed-linear", lambda: nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(4, 5)), floats(2, 3, 6)),
    Case("attention-in", SelfAttention, floats(2, 3, 8), "attention.in_proj_weight"),
    Case("attention-out", SelfAttention, floats(2, 3, 8)),
    Case("attention", SelfAttention, floats(2, 3, 8), "attention"),
    Case("attention-q", SelfAttention, floats(2, 3, 8), "attention.q_proj_weight"),
    Case("attention-qv", SelfAttention, floats(2, 3, 8), ["*.v_proj_weight", "q_proj_weight"]),
    Case(
        "attention-sizes",
        CrossAttention,
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)),
        nn.MultiheadAttention,
    ),
    Case("encoder", encoder, floats(2, 3, 8), ["linear1", "linear2"], mode="beside", leaves_fused_path=True),
    Case("encoder-auto", encoder, floats(2, 3, 8), ["linear1", "linear2"], either=True),
    Case("encoder-whole", encoder, floats(2, 3, 8), nn.TransformerEncoderLayer),
    Case("encoder-padded", PaddedEncoder, sentences, ["linear1", "linear2"], either=True),
    Case("encoder-padded-whole", PaddedEncoder, sentences, nn.TransformerEncoderLayer),
    Case(
        "decoder", decoder, lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 8)), nn.TransformerDecoderLayer, rounding=2
    ),
    Case("encoder-weight", encoder, floats(2, 3, 8), ["linear1", "linear2"], mode="weight"),
    Case(
        "lstm", lambda: nn.LSTM(6, 5), floats(4, 2, 6), ["weight_ih_l0", "weight_hh_l0"], compiles=False, batches=False
    ),
    Case("lstm-whole", projected_lstm, floats(4, 2, 4), nn.LSTM, compiles=False, batches=False),
    Case("gru-whole", lambda: nn.GRU(6, 5, bidirectional=True), floats(4, 2, 6), nn.GRU, compiles=False, batches=False),
    Case("rnn-whole", lambda: nn.RNN(6, 5), floats(4, 2, 6), nn.RNN, compiles=False, batches=False),
    Case("gru-cell", lambda: nn.GRUCell(6, 5), floats(3, 6), "weight_ih"),
    Case("lstm-cell-whole", Steps, floats(2, 3, 6), nn.LSTMCell, batches=False),
    Case("rnn-cell-whole", lambda: nn.RNNCell(6, 5), lambda: (torch.randn(3, 6), torch.randn(3, 5)), nn.RNNCell),
]

LORAS = {
    "lora": LoRA(rank=2, alpha=5),
    "rslora": LoRA(rank=3, alpha=4, scaling="rslora"),
    "gaussian": LoRA(rank=1, init="gaussian", std=0.2),
}
"""For tests that know of A and B alone."""

VARIANTS: dict[str, Variant] = {
    **LORAS,
    "orthogonal": LoRA(rank=2, init="orthogonal"),
    "pissa": LoRA(rank=2, alpha=3, init="pissa"),
    "olora": LoRA(rank=2, init="olora", scaling="rslora"),
    "lora-ga": LoRA(rank=1, init="lora-ga"),
    "eva": LoRA(rank=2, init="eva"),
    "lora-fa": LoRAFA(rank=2, alpha=3),
    "dora": DoRA(rank=2, alpha=3),
    "vera": VeRA(rank=3),
    "loha": LoHa(rank=2, alpha=3),
    "lokr": LoKr(rank=1, alpha=2),
    "lokr-both": LoKr(rank=1, factor=2, decompose_both=True),
    "adalora": AdaLoRA(rank=2, alpha=3),
    "full": Full(),
    "rows": Rows((0, 1)),
}
"""Every variant, and every start that LoRA has: all laws hold for each with each case."""


def refusal(case: Case, name: str) -> str | None:
    """What the error says where a pair has no meaning; None where it has."""
    vectors = case.targets == "all-linear" or case.name.startswith(("linear", "root-", "encoder", "tied"))
    reads = case.name == "attention-out" or (case.name.startswith("encoder") and case.name.endswith("whole"))
    if name == "eva" and (not vectors or reads):
        return "principal directions"
    return None


def _first_of_their_kinds() -> set[str]:
    """The names of the first case of each kind, beside the call and in the weight."""
    seen: dict[tuple[str, str], str] = {}
    for case in CASES:
        for row in lorakit.plan(case.build()[0], LoRA(rank=1), **case.how).rows:
            seen.setdefault((row.kind, row.applied), case.name)
    return set(seen.values())


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FIRST = _first_of_their_kinds()
"""Every variant meets every kind, in every dtype. Other cases of the same kind differ in what the kind itself does."""
EACH = ("lora", "pissa", "dora", "loha", "full")
"""What they meet in float32: variants that use all that a kind can do, `beside`, `call`, `scale_rows` and the rest."""
_PAIRS = [
    (case, name, variant)
    for case in CASES
    for name, variant in VARIANTS.items()
    if refusal(case, name) is None and (case.name in FIRST or name in EACH)
]


def _dtypes(case: Case, name: str) -> dict[str, torch.dtype]:
    if case.name in FIRST:
        return DTYPES | ({"float16": torch.float16} if name == "lora" else {})
    return DTYPES if name == "lora" else {"float32": torch.float32}


over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
over_loras = pytest.mark.parametrize("variant", LORAS.values(), ids=LORAS)
over_pairs = pytest.mark.parametrize(
    ("case", "variant"), [pytest.param(case, variant, id=f"{case.name}-{name}") for case, name, variant in _PAIRS]
)
over_pairs_and_dtypes = pytest.mark.parametrize(
    ("case", "variant", "dtype"),
    [
        pytest.param(case, variant, dtype, id=f"{case.name}-{name}-{kind}")
        for case, name, variant in _PAIRS
        for kind, dtype in _dtypes(case, name).items()
    ],
)
over_dtypes = pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float16], ids=[*DTYPES, "float16"])
