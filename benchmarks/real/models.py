"""Real pretrained networks, written anew from their papers so that their published state dicts load strictly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.data import SHARED
from benchmarks.real.voice import VoiceActivity

M = TypeVar("M", bound=nn.Module)

RESNETS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}
"""Depth → file."""


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A of He et al. 2015, arXiv:1512.03385, §3.3)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs, height / stride, width / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.before or self.after:  # every second pixel; the new channels, half on each side, are zero
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR-10 network of He et al. 2015, §4.2: 6·blocks + 2 layers of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride=1 if inputs == outputs else 2)
    return nn.Sequential(first, *(Block(outputs, outputs, stride=1) for _ in range(blocks - 1)))


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling; images of 32×32."""

    def __init__(self) -> None:
        super().__init__()
        self.convnet = nn.Sequential()
        for name, layer in (
            ("c1", nn.Conv2d(1, 6, 5)), ("relu1", nn.ReLU()), ("s2", nn.MaxPool2d(2)),
            ("c3", nn.Conv2d(6, 16, 5)), ("relu3", nn.ReLU()), ("s4", nn.MaxPool2d(2)),
            ("c5", nn.Conv2d(16, 120, 5)), ("relu5", nn.ReLU()),
        ):  # fmt: skip
            self.convnet.add_module(name, layer)
        self.fc = nn.Sequential()
        self.fc.add_module("f6", nn.Linear(120, 84))
        self.fc.add_module("relu6", nn.ReLU())
        self.fc.add_module("f7", nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        return self.fc(self.convnet(x).flatten(1))  # type: ignore[no-any-return]


class SmallConv(nn.Module):
    """Two 5×5 convolutions, pooled, and two linear layers: the MNIST example of PyTorch's early years; 28×28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


class PaddedConv(nn.Module):
    """Two padded 3×3 convolutions, pooled, and three linear layers; 28×28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        return self.fc(self.conv2(self.conv1(x)).flatten(1))  # type: ignore[no-any-return]


MNIST_CNNS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": LeNet5,
    "lreich": PaddedConv,
    "graykode": SmallConv,
    "starlento": SmallConv,
}
"""Name → network; their files are named after them."""


def resnet(depth: int = 20) -> CifarResNet:
    """A pretrained ResNet of 20, 32, 44 or 56 layers, in eval mode."""
    net = CifarResNet((depth - 2) // 6)
    state = torch.load(SHARED / "models" / "resnet-cifar10" / RESNETS[depth], map_location="cpu", weights_only=True)
    return _filled(net, {name.removeprefix("module."): value for name, value in state["state_dict"].items()})


def mnist_cnn(name: str) -> nn.Module:
    """A pretrained MNIST network, in eval mode."""
    (path,) = (SHARED / "models" / "mnist-cnn").glob(f"{name}_mnist*.pt")
    return _filled(MNIST_CNNS[name](), torch.load(path, map_location="cpu", weights_only=True))


def voice_activity() -> VoiceActivity:
    """The pretrained voice activity network for 16 kHz, in eval mode."""
    from safetensors.torch import load_file

    return _filled(VoiceActivity(), load_file(SHARED / "models" / "silero-vad" / "silero_vad_16k.safetensors"))


def stories(folder: Path = SHARED / "models" / "stories260K") -> tuple[nn.Module, Callable[..., object]]:
    """The Llama of 260 thousand parameters trained on TinyStories, in eval mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def cifar_input(pixels: Tensor) -> Tensor:
    """uint8 pixels as the ResNets were trained on: by ImageNet's means; channels last, which is faster on a CPU."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def digit_input(name: str) -> Callable[[Tensor], Tensor]:
    """What makes uint8 pixels of 28×28 into the input of that MNIST network."""

    def prepare(pixels: Tensor) -> Tensor:
        x = (pixels.float() / 255 - 0.1307) / 0.3081
        return F.interpolate(x, size=(32, 32), mode="bilinear") if name == "lenet5" else x

    return prepare


def _filled(net: M, state: Mapping[str, Tensor]) -> M:
    net.load_state_dict(state, strict=True)
    return net.eval()
