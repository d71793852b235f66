"""What the tests share: outputs, factors, the dense formula, and a full picture of a model."""

import copy
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk

Factors = dict[str, tuple[Tensor, Tensor]]
"""{name of the weight: (A, B)}"""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The model's output; its first tensor if there are several."""
    output = model(*inputs)
    return output if isinstance(output, Tensor) else output[0]


REGIMES = ("train", "eval", "inference")


def run_everywhere(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The outputs in train mode, in eval mode, and in eval mode without gradients, where torch has fused paths."""
    training = model.training
    outputs = {}
    for regime in REGIMES:
        with torch.set_grad_enabled(regime != "inference"):
            outputs[regime] = run(model.train(regime == "train"), inputs).detach()
    model.train(training)
    return outputs


@torch.no_grad()
def randomize(model: nn.Module, name: str | None = None, seed: int = 1, std: float = 0.3) -> None:
    """Noise in all trained tensors, the same for the same seed: as if the adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lk.adapter_parameters(model, name):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def attached(model: nn.Module, variant: Any = None, *, seed: int = 1, **how: Any) -> nn.Module:
    """The model, with an adapter that does something."""
    lk.attach(model, variant or lk.LoRA(rank=2), **how)
    randomize(model, how.get("name", "default"), seed)
    return model


def factor_key(weight: str, name: str, tensor: str) -> str:
    """The state-dict key of A or B of one adapted weight."""
    layer, _, parameter = weight.rpartition(".")
    return f"{layer}.lora.{parameter}.{name}.{tensor}".removeprefix(".")


def factors_of(model: nn.Module, name: str = "default") -> Factors:
    """Copies of A and B of every adapted weight."""
    state = model.state_dict()
    return {
        weight: (state[factor_key(weight, name, "A")].clone(), state[factor_key(weight, name, "B")].clone())
        for weight in weights_of(model, name)
    }


class Weight(str):
    """The name of an adapted weight."""

    slices: str = ""
    """Of the packed projection of attention: which of q, k and v are adapted, each by itself; "" is all as one."""


def weights_of(model: nn.Module, name: str = "default") -> list[Weight]:
    """The adapted weights of an adapter."""
    weights = [Weight(weight) for weight in lk.adapters(model)[name].weights]
    for weight in weights:
        kind = model.get_submodule(factor_key(weight, name, "A").rpartition(".")[0]).kind
        weight.slices = "".join(slice_name[0] for slice_name in kind.slices)
    return weights


def attach(model: nn.Module, case: Any, variant: Any, inputs: tuple[Tensor, ...], **more: Any) -> Any:
    """`lk.attach` to the weights of a case, with data for the starts that are computed from some."""
    data = {"data": [inputs], "loss": lambda model, batch: run(model, batch).square().mean()} if variant.needs else {}
    return lk.attach(model, variant, **case.how, **data, **more)


def tensors_of(model: nn.Module, weight: str, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one update by their keys in the model's state dict."""
    prefix = factor_key(weight, name, "")
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefix)}


def scale_of(variant: Any) -> float:
    """The factor before B·A, from the papers: alpha/r, and alpha/√r for rsLoRA."""
    alpha = variant.rank if variant.alpha is None else variant.alpha
    return alpha / (math.sqrt(variant.rank) if getattr(variant, "scaling", "") == "rslora" else variant.rank)


def dense(plain: nn.Module, updates: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a plain model in which each named weight W is a plain tensor W + update: the formula itself."""
    model = copy.deepcopy(plain)
    weights = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in updates}
    for name, (layer, parameter) in weights.items():
        weight = layer._parameters.pop(parameter)
        assert weight is not None
        wide = weight.detach().to(torch.promote_types(weight.dtype, updates[name].dtype))
        setattr(layer, parameter, (wide + updates[name].view(weight.shape)).to(weight.dtype))
    return model


def dense_lora(plain: nn.Module, factors: Factors, scale: float) -> nn.Module:
    """`dense` for scale·B·A, differentiable in A and B."""
    return dense(plain, {name: scale * product(plain, name, A, B) for name, (A, B) in factors.items()})


def product(plain: nn.Module, name: str, A: Tensor, B: Tensor) -> Tensor:
    """B·A with the axes of the weight, from torch's definition of each layer."""
    layer = plain.get_submodule(name.rpartition(".")[0])
    if slices := getattr(name, "slices", ""):
        parts = {letter: b @ a for letter, a, b in zip(slices, A, B, strict=True)}
        zeros = torch.zeros(B.shape[1], A.shape[2], dtype=A.dtype)
        return torch.cat([parts.get(letter, zeros) for letter in "qkv"])
    if A.dim() == B.dim() == 3 and not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
        return torch.stack([b @ a for a, b in zip(A, B, strict=True)])  # an update for each expert
    delta = B.flatten(1) @ A.flatten(1)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        delta = delta.t()
        if layer.padding_idx is not None:
            delta = delta.index_fill(0, torch.tensor(layer.padding_idx), 0.0)
        return delta
    if type(layer).__name__ == "Conv1D":  # of transformers: (in, out)
        return delta.t()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        parts = [part.view(-1, *A.shape[1:]).transpose(0, 1) for part in delta.chunk(layer.groups)]
        return torch.cat(parts)  # (in, out/groups, *kernel)
    return delta


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype | None = None, factor: float = 1.0) -> None:
    """Equal to the precision of the dtype, measured against the largest value."""
    assert got.shape == wanted.shape
    if not wanted.numel():
        return
    limit = factor * TOLERANCE[dtype or wanted.dtype] * max(1.0, wanted.abs().max().item())
    error = (got.double() - wanted.double()).abs().max().item()
    assert error <= limit, f"{error} > {limit}"


def assert_bits(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same keys in the same order, and the same values to the bit."""
    assert list(got) == list(wanted)
    for key in wanted:
        assert got[key].dtype == wanted[key].dtype and got[key].shape == wanted[key].shape, key
        assert torch.equal(_bytes(got[key]), _bytes(wanted[key])), key


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later changes cannot reach."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def storage(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Where each tensor lies in memory."""
    return {key: tensor.data_ptr() for key, tensor in tensors.items()}


def picture(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """All there is to a model: classes, every attribute of every module, and the values of all tensors.

    Two pictures are compared with `assert_same`.
    """
    return anatomy(model), clones(model.state_dict())


def anatomy(model: nn.Module) -> Any:
    """Classes, and every attribute of every module but what calls keep to be faster."""
    return {
        path: (type(module), {key: _still(value) for key, value in vars(module).items() if key != "ready"})
        for path, module in model.named_modules(remove_duplicate=False)
    }


def _still(value: Any) -> Any:
    """A value that can be compared later, even if the object has changed by then."""
    if isinstance(value, weakref.ref):
        return weakref.ref  # a cache of torch's RNNs, which they check and renew at every call
    if isinstance(value, MethodType):
        return value.__func__, id(value.__self__)
    if isinstance(value, partial):
        return value.func, [id(arg) for arg in value.args], value.keywords
    if isinstance(value, nn.Parameter):
        return id(value), value.requires_grad, value.data_ptr()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), {field.name: _still(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return [(key, _still(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_still(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def assert_same(after: tuple[Any, dict[str, Tensor]], before: tuple[Any, dict[str, Tensor]]) -> None:
    """Nothing was left and nothing was taken: the two pictures are of the same model in the same state."""
    assert after[0] == before[0]
    assert_bits(after[1], before[1])


@contextmanager
def refused(model: nn.Module, *words: str) -> Iterator[None]:
    """The block raises a LorakitError that holds all these words, and the model is as it was."""
    before = picture(model)
    with pytest.raises(lk.LorakitError) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same(picture(model), before)


class KeptForBackward:
    """What autograd keeps inside the block, each storage once, without the model's own parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.kept: dict[int, Tensor] = {}

    def __enter__(self) -> "KeptForBackward":
        def keep(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in self.own:
                self.kept[place] = tensor
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())

    @property
    def largest(self) -> int:
        """The elements of the largest tensor."""
        return max((tensor.numel() for tensor in self.kept.values()), default=0)
