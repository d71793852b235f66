"""What a variant is: hyper-parameters that build the trained tensors of one weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.layers import Kind, Mode, Update


class Variant(ABC):
    """A method of low-rank adaptation. Subclasses are frozen dataclasses that validate their hyper-parameters.

    A variant names no type of layer: it asks the `Kind` for shapes and lets it do the layer's arithmetic.
    """

    file_names: ClassVar[Mapping[str, str]]
    """What each trained tensor is called in PEFT's files, after the layer's name."""
    reads_weight: ClassVar[bool] = False
    """Whether `build` looks at the weight's values; otherwise a quantized one is given as a shape, its values NaN."""

    @abstractmethod
    def peft_fields(self) -> dict[str, Any]:
        """The hyper-parameters under the names of PEFT's `adapter_config.json`."""

    @abstractmethod
    def build(self, kind: Kind, weight: Tensor, mode: Mode) -> Update:
        """The tensors to train for `weight`, on its device, in a state that changes no output.

        Raises `LorakitError` if the variant has no meaning there.
        """

    @abstractmethod
    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """What a user should know before adapting this weight so, though it works; None if nothing."""
