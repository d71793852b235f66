"""What a format is: how its files are recognised, read and written, and how its names become a model's."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorakit.errors import LorakitError
from lorakit.formats.content import Content
from lorakit.formats.names import Names
from lorakit.header import Header
from lorakit.values.adapter import Adapter
from lorakit.variants.checks import checked_integer, checked_number


@dataclass(frozen=True)
class Known:
    """What a file may not hold and whoever reads or writes it knows. None: not known."""

    alpha: float | None = None
    """The numerator of the scale alpha/r."""
    enabled: tuple[bool, ...] | None = None
    """Which parts of a fused projection are adapted: (True, False, True) for q and v."""
    heads: int | None = None
    """Attention heads of the model, where rows of q lie in another order in the file."""
    kv_heads: int | None = None
    """Heads of keys and values; None: as many as `heads`."""
    part: str | None = None
    """Which model of a pipeline is meant: "unet", "text_encoder"."""
    arch: str | None = None
    """The architecture, as GGUF calls it: "llama"."""

    def __post_init__(self) -> None:
        if self.alpha is not None:
            checked_number("alpha", self.alpha, above=0)
        for name in ("heads", "kv_heads"):
            if getattr(self, name) is not None:
                checked_integer(name, getattr(self, name), at_least=1, at_most=2**12)
        enabled = self.enabled
        if enabled is not None and (not any(enabled) or not all(part in (True, False) for part in enabled)):
            raise LorakitError(f"enabled={enabled!r} must say of each part whether it is adapted: (True, False, True)")
        if enabled is not None:
            object.__setattr__(self, "enabled", tuple(map(bool, enabled)))


@dataclass(frozen=True)
class Written:
    """What a writer made."""

    files: Mapping[str, bytes]
    """The content of each file by its name, in a directory; one file alone if the format is one file."""
    lost: tuple[str, ...] = ()
    """What the format has no place for and does not change any output: dropout, fingerprints of the base."""


@dataclass(frozen=True)
class Format:
    """One format of adapter files."""

    name: str
    title: str
    """Whose it is, in a few words."""
    recognises: Callable[[Content], bool]
    """Whether a file is of this format, by its keys. No two formats recognise one file."""
    read: Callable[[Content, Known], Adapter]
    write: Callable[[Adapter, Known], Written] | None = None
    """Raises a `LorakitError` that lists everything the format cannot hold and outputs depend on."""
    parts: Callable[[Content, Known], tuple[Header, dict[str, Tensor]] | None] | None = None
    """For formats whose keys are the native ones: header and tensors, which nobody has compared with each other; None
    of a file whose names are not those of a model's layers, after all."""
    takes: tuple[str, ...] = ()
    """Which fields of `Known` a file of this format may lack, and is read with; other ones are an error."""
    asks: tuple[str, ...] = ()
    """Which fields of `Known` its writer may need; other ones are an error."""
    suffixes: tuple[str, ...] = (".safetensors",)
    """What a path ends in that is written as one file."""
    directory: bool = False
    """Whether it is a directory of several files."""
    resolve: Mapping[str, Callable[[Adapter, Names, Known], Adapter]] = field(default_factory=dict)
    """How adapters of a naming get the names of a model's layers, for each `Adapter.naming` that `read` gives."""


def check_needed(what: str, known: Known, needed: Collection[str]) -> None:
    """Whether all that was given is of use.

    Raises:
        LorakitError: something would be ignored.
    """
    needless = [name for name, value in vars(known).items() if value is not None and name not in needed]
    if needless:
        raise LorakitError(f"{what} needs no {', '.join(needless)}: leave it away")


def no_place(name: str, problems: list[str]) -> None:
    """One error that lists what a format has no place for.

    Raises:
        LorakitError: there is something.
    """
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise LorakitError(f"{name} cannot hold this adapter:{listed}")
