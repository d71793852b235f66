"""The quantized and foreign linear layers that the laws run over: small models, and what their makers' code can do."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers import dense_weight, kinds_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these libraries say when they are imported
    import bitsandbytes as bnb
    import torchao.quantization as ao
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far apart two ways to compute the same may be."""
IN, HIDDEN, OUT = 128, 128, 128


@dataclass(frozen=True)
class Quantized:
    """A way to store the weights of a model of two linear layers."""

    name: str
    convert: Callable[[nn.Sequential], nn.Sequential]
    note: str
    """What the plan says."""
    dtype: torch.dtype = torch.float32
    rounds_inputs: bool = False
    """Whether the layer rounds its inputs too, so that it computes with its weights to a percent only."""
    differentiates: bool = True
    """Whether the layer sends a gradient to its input."""
    loads: bool = True
    """Whether the bare model loads its own state dict."""
    pickles: bool = True
    compiles: bool = True
    requantizes: bool = False
    """Whether an adapter can be merged and the weight quantized again."""
    becomes_plain: bool = True
    """Whether an adapter can be merged into a plain layer."""

    def build(self, seed: int = 0) -> tuple[nn.Sequential, Tensor]:
        """The model, called once (some layers only then take their final form), and an input."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False)).to(self.dtype)
        x = torch.randn(2, 3, IN, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own calls its function deprecated
            model = self.convert(model).train()
        model(x.clone().requires_grad_())
        return model, x


def each_linear(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Sequential], nn.Sequential]:
    """Put another layer in the place of each `nn.Linear`."""
    return lambda model: nn.Sequential(*(make(m) if isinstance(m, nn.Linear) else m for m in model))


def four_bits(quant_type: str, compress_statistics: bool) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            quant_type=quant_type,
            compress_statistics=compress_statistics,
        )
        new.load_state_dict(layer.state_dict())
        new.support_avx512bf16_for_cpu = (
            False  # there, it rounds its weights for good when it is first called in eval()
        )
        return new.to("cpu")

    return make


def eight_bits(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def torchao(config: Callable[[], Any]) -> Callable[[nn.Sequential], nn.Sequential]:
    def convert(model: nn.Sequential) -> nn.Sequential:
        ao.quantize_(model, config())
        return model

    return convert


def nf4_tensors(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)
    return layer


def torch_dynamic(dtype: torch.dtype) -> Callable[[nn.Sequential], nn.Sequential]:
    return lambda model: torch.ao.quantization.quantize_dynamic(model.requires_grad_(False), {nn.Linear}, dtype=dtype)


class Packed(nn.Module):
    """A layer of nobody's: signs and scales in buffers, no weight at all, but it can put one together."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("signs", layer.weight.detach() > 0)
        self.register_buffer("scales", layer.weight.detach().abs().mean(1))
        self.bias = layer.bias

    def dequantize(self) -> Tensor:
        return (self.signs * 2.0 - 1.0) * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)


class Sealed(nn.Module):
    """A layer that only says its sizes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.hidden = [layer.weight.detach().clone()]

    def __deepcopy__(self, memo: Any) -> "Sealed":
        new = nn.Module.__new__(type(self))
        new.__dict__ = {key: copy.deepcopy(value, memo) for key, value in vars(self).items()}
        return new

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.hidden[0])


class Standardized(nn.Module):
    """A layer with a plain weight that it uses in its own way: each row is made to have mean 0 and size 1."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, centred / centred.norm(dim=1, keepdim=True), self.bias)


QUANTIZED = [
    Quantized("nf4", each_linear(four_bits("nf4", False)), "nf4", loads=False, requantizes=True),
    Quantized("nf4-double", each_linear(four_bits("nf4", True)), "nf4", loads=False, requantizes=True),
    Quantized("fp4", each_linear(four_bits("fp4", False)), "fp4", loads=False, requantizes=True),
    Quantized("int8", each_linear(eight_bits), "int8", rounds_inputs=True, loads=False, requantizes=True),
    Quantized("torchao-int8", torchao(ao.Int8WeightOnlyConfig), "Int8Tensor", pickles=False),
    Quantized("torchao-int8-bfloat16", torchao(ao.Int8WeightOnlyConfig), "Int8Tensor", torch.bfloat16, pickles=False),
    Quantized(
        "torchao-int4",
        torchao(lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        "IntxUnpackedToInt8Tensor of int4",
        pickles=False,
    ),
    Quantized("torchao-float8", torchao(ao.Float8WeightOnlyConfig), "Float8Tensor", pickles=False),
    Quantized(
        "torchao-int8-dynamic",
        torchao(ao.Int8DynamicActivationInt8WeightConfig),
        "Int8Tensor",
        rounds_inputs=True,
        differentiates=False,
        pickles=False,
    ),
    Quantized("torchao-nf4", each_linear(nf4_tensors), "NF4Tensor", torch.bfloat16),
    Quantized(
        "torch-dynamic", torch_dynamic(torch.qint8), "qint8", rounds_inputs=True, differentiates=False, compiles=False
    ),
    Quantized("torch-dynamic-half", torch_dynamic(torch.float16), "float16", differentiates=False, compiles=False),
    Quantized("packed", each_linear(Packed), ""),
]
"""Each way to store a weight that can be read as floats."""

UNREAD = [
    Quantized("sealed", each_linear(Sealed), "", becomes_plain=False),
    Quantized("standardized", each_linear(Standardized), "", becomes_plain=False),
]
"""Layers whose weight is none, or not what they compute with."""

typed_storage = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
"""Torch's own, when it copies a quantized tensor."""
over_readable = pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case.name)
over_quantized = pytest.mark.parametrize("case", QUANTIZED + UNREAD, ids=lambda case: case.name)


def dense_of(layer: nn.Module) -> Tensor:
    """What a layer's weight reads as."""
    return dense_weight(layer, kinds_of(layer)[0])


def relative(a: Tensor, b: Tensor) -> float:
    """How far a is from b, in Frobenius norms."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bits(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the plain tensors that the model's state is made of, however they are wrapped; no adapter's."""
    return {key: list(_plain(value)) for key, value in model.state_dict().items() if ".lora." not in f".{key}"}


def _plain(value: Any):
    if isinstance(value, tuple | list):
        for entry in value:
            yield from _plain(entry)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield value.int_repr()
        yield value.dequantize()
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value.detach().clone()


def assert_same_bits(got: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
    assert list(got) == list(wanted)
    for key, tensors in wanted.items():
        for a, b in zip(got[key], tensors, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), key
