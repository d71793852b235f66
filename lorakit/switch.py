"""Which adapters act: a single write, whatever the size of the model and the number of adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.errors import LorakitError
from lorakit.layers import RowChoice
from lorakit.state import State, check_together, require, sites
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
    state.selection.choose(strengths.items())


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
        state.selection.choose(strengths.items())
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Exactly the base inside a `with` block."""
    _, state = require(model)
    with _restored(state):
        state.selection.choose(())
        yield


@contextmanager
def per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside a `with` block, an adapter for each row of the batch: a name, or None for the base alone.

    Row i of the first axis is computed with the adapter of that name, or with the base alone; in training the gradient
    of each row reaches its own adapter (those that `set_trainable` lets train). Rows are told by the first axis of what
    each adapted layer returns, so the model must keep the batch there: a layer that sees another size is an error.

    Example:
        >>> with per_row(model, ["sql", None, "js"]):
        ...     y = model(x)  # three rows

    Raises:
        LorakitError: no rows, an unknown name, or an adapter that acts in a weight, which all rows share.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise LorakitError(f"{names!r} is no choice for the rows of a batch: give a list with a name or None for each")
    bad = [name for name in names if not (name is None or isinstance(name, str))]
    if bad:
        raise LorakitError(f"{bad[0]!r} is no name of an adapter, nor None for the base")
    used = list(dict.fromkeys(name for name in names if name is not None))
    root, state = require(model, used)
    for name in used:
        if name in state.selection.reading:
            read = [site.name for site in sites(root, name) if site.adapted[name].mode == "weight"]
            raise LorakitError(
                f"adapter {name!r} cannot be chosen by row: it acts in {', '.join(map(repr, read))}, a weight that all "
                "rows share; adapt the layer beside its call, or run the rows apart"
            )
    with _restored(state):
        state.selection.choose((), RowChoice(names))
        yield


@contextmanager
def _restored(state: State) -> Iterator[None]:
    active, rows = state.selection.active, state.selection.rows
    try:
        yield
    finally:
        # An adapter that was removed inside the block does not come back.
        gone = set(rows.groups if rows is not None else ()) - set(state.variants)
        state.selection.choose([chosen for chosen in active if chosen[0] in state.variants], None if gone else rows)


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
