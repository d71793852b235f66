"""Columns: which of them a file has, so of which kind its rows are."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Layout:
    """The kind of a file's rows, and the column of each role."""

    kind: str
    columns: Mapping[str, str]


class _Known(NamedTuple):
    """A layout that is recognised: the columns it must have, and those it may have, by their roles."""

    kind: str
    must: Mapping[str, str]
    may: Mapping[str, tuple[str, ...]] = {}


_TOOLS = {"tools": ("tools",)}
_INPUT = {"input": ("input", "context")}
_LAYOUTS = (
    _Known("messages", {"messages": "messages"}, _TOOLS),
    _Known("messages", {"messages": "conversations"}, _TOOLS),
    _Known("prompt", {"prompt": "prompt", "completion": "completion"}, _TOOLS),
    _Known("instruction", {"instruction": "instruction", "output": "output"}, _INPUT),
    _Known("instruction", {"instruction": "instruction", "output": "response"}, _INPUT),
    _Known("instruction", {"instruction": "question", "output": "answer"}),
    _Known("text", {"text": "text"}),
)
_ROLES = {role for known in _LAYOUTS for role in (*known.must, *known.may)}
_NAMES = {name for known in _LAYOUTS for name in known.must.values()}
FORMS = ("auto", "messages", "prompt", "instruction", "text")

EXPECTED = (
    "Expected are messages (or conversations); prompt and completion; instruction, perhaps input, and output (or "
    "response); question and answer; or text"
)


def recognised(
    source: str, usual: Collection[str], found: Sequence[str], form: str, given: Mapping[str, str]
) -> Layout:
    """The layout of a file.

    Messages come first, text last: a file may hold its examples once more in one of them. Between, a file that fits
    two layouts is not guessed at.

    Args:
        source: the file's name.
        usual: the columns that most rows have.
        found: all columns that there are.
        form: a kind to look for, or "auto".
        given: columns by role, for names that are not known.

    Raises:
        LorakitError: no layout fits, or several do, or what is given is not there.
    """
    _check_given(source, found, given)
    taken = set(given.values())
    columns = {name for name in usual if name not in taken}
    fits: dict[tuple[object, ...], Layout] = {}
    for known in _LAYOUTS:
        if not (form in ("auto", known.kind) and given.keys() <= {*known.must, *known.may}):
            continue
        must = {role: given.get(role, name) for role, name in known.must.items()}
        if all(role in given or name in columns for role, name in must.items()):
            may = {
                role: given[role] if role in given else next((n for n in names if n in found and n not in taken), None)
                for role, names in known.may.items()
            }
            layout = Layout(known.kind, {**must, **{role: name for role, name in may.items() if name is not None}})
            fits.setdefault((known.kind, *must.values()), layout)  # where all is given, two layouts are one
    if not fits:
        raise LorakitError(_unknown(source, found, form, given))
    groups = {"messages": 0, "text": 2}
    first = min(groups.get(fit.kind, 1) for fit in fits.values())
    best = [fit for fit in fits.values() if groups.get(fit.kind, 1) == first]
    if len(best) > 1:
        ways = ", or ".join(" and ".join(fit.columns.values()) for fit in best)
        kinds = {fit.kind for fit in best}
        way = "form: " + " or ".join(sorted(kinds)) if len(kinds) > 1 else "columns: {" + _as_given(best[0]) + "}"
        raise LorakitError(f"{source} can be read by its columns {ways}: say which, with {way}")
    return best[0]


def _as_given(layout: Layout) -> str:
    return ", ".join(f"{role}: {name}" for role, name in layout.columns.items())


def _check_given(source: str, found: Sequence[str], given: Mapping[str, str]) -> None:
    for role, name in given.items():
        if role not in _ROLES:
            near = get_close_matches(str(role), sorted(_ROLES), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(_ROLES))}"
            raise LorakitError(f"columns: {role!r} is not what a column can be: {hint}")
        if name not in found:
            near = get_close_matches(str(name), found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LorakitError(f"{source} has no column {name!r} for the {role}: it has {_listed(found)}{hint}")


def _unknown(source: str, found: Sequence[str], form: str, given: Mapping[str, str]) -> str:
    """What there is, what is near to what is known, and how to say which column is which."""
    near = {}
    for name in found:
        match = get_close_matches(str(name).lower(), sorted(_NAMES - set(found)), n=1, cutoff=0.7)
        if match:
            near[name] = match[0]
    hints = "".join(f"; {name!r} is near to {known!r}" for name, known in list(near.items())[:3])
    asked = f" of the form {form}" if form != "auto" else ""
    told = f" with columns {dict(given)}" if given else ""
    pair = (*[n for n in found if isinstance(n, str)][:2], "question", "query")[:2]
    return (
        f"{source}: its columns {_listed(found)} are no layout that is known{asked}{told}{hints}. {EXPECTED}. "
        f"Or say which is which, such as columns: {{prompt: {pair[0]}, completion: {pair[1]}}}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return (f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown) or "(none)"
