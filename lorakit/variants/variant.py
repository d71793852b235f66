"""What a variant is: hyper-parameters that build the trained tensors of one weight."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorakit.layers import Kind, Mode, Update

Evidence = Literal["inputs", "gradients", "original"]
"""What a start can be computed from, beside the weight: the layer's inputs, the loss's gradient, the true weight."""

VARIANTS: dict[str, type["Variant"]] = {}
"""Every variant that can be built, by the name that files give it; also one defined outside of this package."""


@dataclass(frozen=True)
class Variant(ABC):
    """A method of low-rank adaptation. Subclasses are frozen dataclasses that validate their hyper-parameters.

    A variant names no type of layer: it asks the `Kind` for shapes and lets it do the layer's arithmetic.
    """

    file_names: ClassVar[Mapping[str, str]]
    """What each tensor of its updates is called in PEFT's files, after the layer's name."""
    shared_names: ClassVar[Sequence[str]] = ()
    """Keys of PEFT's files for what all weights have in common and what is not stored here."""
    no_product: ClassVar[str] = "is no product of two thin factors"
    """Why ΔW is not known from the two factors alone, if it is not."""
    exclusive: ClassVar[bool] = False
    """Whether only one such update can act on a weight: it rescales the whole weight, and two have no sum."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if ABC not in cls.__bases__:
            VARIANTS[cls.__name__] = cls

    @abstractmethod
    def build(self, kind: Kind, weight: Tensor, mode: Mode, evidence: Tensor | None = None) -> Update:
        """The tensors to train for `weight`, on its device, in a state that changes no output.

        `evidence` is what `needs` asks for. A weight on `meta` is a sketch: only the shapes count, nothing is drawn
        from values. Raises `LorakitError` if the variant has no meaning there.
        """

    @abstractmethod
    def peft_fields(self) -> dict[str, Any]:
        """peft_type and the hyper-parameters, under the names of PEFT's `adapter_config.json`."""

    @property
    def needs(self) -> Evidence | None:
        """What its start is computed from, beside the weight."""
        return None

    @property
    def reads_weight(self) -> bool:
        """Whether `build` looks at the weight's values; if not, a quantized one may be given as a shape full of NaN."""
        return False

    @property
    def shared_numbers(self) -> int:
        """How many numbers are made for all weights together that a file does not hold."""
        return 0

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> "Variant":
        """The variant for weights of these matrix shapes, if that depends on all of them at once."""
        return self

    def caution(self, kind: Kind, weight: Tensor) -> str | None:
        """What a user should know before adapting this weight so, though it works; None if nothing.

        It is asked once for all weights of one shape and dtype.
        """
        return None

    def product(self, saved: Mapping[str, Tensor], inner: int) -> tuple[Tensor, Tensor] | None:
        """ΔW = B·A as two matrices with the scale in B, (d, r) and (r, k), after the stack's axis if there is one.

        `saved` is what a file holds, by the names of `file_names`; the inner axis of B is `inner`, 2 in a stack and
        else 1. None if ΔW is no such product, or is not known without the weight.
        """
        return None

    def incomplete(self, names: Collection[str]) -> str | None:
        """What is missing if a file holds just these of `file_names`; None if nothing."""
        missing = [file_name or name for name, file_name in self.file_names.items() if name not in names]
        return ", ".join(missing) or None

    @classmethod
    def of_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Variant | None":
        """The variant that a config of PEFT describes, beside the tensors of its file; None if it is another one."""
        return None
