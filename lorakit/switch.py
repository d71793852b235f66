"""Which adapters act: a single write, whatever the size of the model and the number of adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.errors import LorakitError
from lorakit.state import State, check_together, require
from lorakit.variants.checks import is_finite_number

Choice = str | Sequence[str] | Mapping[str, float]


def activate(model: nn.Module, choice: Choice) -> None:
    """Let one adapter act, or several.

    Takes constant time and never touches `requires_grad`: what is trained is set by `attach` and `set_trainable`. The
    choice is one for the whole model and all threads: threads that want different adapters need copies of the model.

    Args:
        model: the model that was given to `attach`.
        choice: a name; a list of names; or names with strengths, {"sql": 0.7, "js": 0.3}: each update is multiplied
            by its strength before it is added. An empty list leaves the base alone.

    Raises:
        LorakitError: an unknown name, a strength that is no finite number, or two adapters that cannot act together
            (two DoRA on one weight); the choice is as it was.
    """
    strengths = strengths_of(choice)
    _, state = require(model, list(strengths))
    check_together(state, strengths)
    state.selection.active = tuple(strengths.items())


@contextmanager
def active(model: nn.Module, choice: Choice) -> Iterator[None]:
    """`activate` inside a `with` block; the choice from before is back after it, whatever was chosen inside.

    Call `backward()` inside the block too if the model recomputes activations (gradient checkpointing): what is
    recomputed later is computed with the choice of then.
    """
    strengths = strengths_of(choice)
    _, state = require(model, list(strengths))
    check_together(state, strengths)
    with _restored(state):
        state.selection.active = tuple(strengths.items())
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Exactly the base inside a `with` block."""
    _, state = require(model)
    with _restored(state):
        state.selection.active = ()
        yield


@contextmanager
def _restored(state: State) -> Iterator[None]:
    before = state.selection.active
    try:
        yield
    finally:
        # An adapter that was removed inside the block does not come back.
        state.selection.active = tuple(chosen for chosen in before if chosen[0] in state.variants)


def strengths_of(choice: Choice) -> dict[str, float]:
    """{name: strength}, checked."""
    if isinstance(choice, str):
        return {choice: 1.0}
    if not isinstance(choice, Sequence | Mapping) or not all(isinstance(name, str) for name in choice):
        raise LorakitError(f"{choice!r} is no choice of adapters: give a name, a list of names, or {{name: strength}}")
    strengths = dict(choice) if isinstance(choice, Mapping) else dict.fromkeys(choice, 1.0)
    if len(strengths) != len(choice):
        raise LorakitError(f"{choice!r} names an adapter twice")
    for name, strength in strengths.items():
        if not is_finite_number(strength):
            raise LorakitError(f"the strength of {name!r} must be a finite number, not {strength!r}")
    return {name: float(strength) for name, strength in strengths.items()}
