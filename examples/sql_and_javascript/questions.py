"""The real questions: Geography and ATIS with their queries, from the text2sql collection (Finegan-Dollak et al. 2018).

Both are split by question, as the collection has it ("question-split"): a question to test was never trained on, its
query may have been. Variables are put in: a question's own value, or the query's example where the question names none.
Of several queries for a question the first counts, as in the paper.

Outside of its strings a query is put into lower case, and the alias `CITYalias0` becomes `city0`. Neither changes what
a query means, and the first can be undone, so an exact match is one of the published queries; it halves the tokens.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from examples.sql_and_javascript import database
from examples.sql_and_javascript.pairs import Pair, Task
from lorakit.errors import LorakitError

SETS = ("geography", "atis")
DATABASE = "geography-db.added-in-2020.sqlite"
_PARTS = ("train", "dev", "test")
_QUOTED = re.compile(r'("[^"]*")')


def published(folder: Path, fits: Callable[[Pair], bool]) -> Task:
    """The task of both sets.

    Args:
        folder: the `data` folder of the collection.
        fits: whether a pair is short enough for the network.

    Raises:
        LorakitError: the files are not there or not in order.
    """
    parts: dict[str, list[Pair]] = {part: [] for part in _PARTS}
    notes = []
    for name in SETS:
        known = list(_pairs(folder / f"{name}.json", name))
        for part in _PARTS:
            parts[part] += [pair for where, pair in known if where == part and fits(pair)]
        kept = {part: sum(pair.origin == name for pair in parts[part]) for part in _PARTS}
        counts = {part: sum(where == part for where, _ in known) for part in _PARTS}
        shown = ", ".join(f"{kept[part]} of {counts[part]} {part}" for part in _PARTS)
        notes.append(f"{name}: question split; pairs that are short enough: {shown}")
    connection = database.open_database(folder / DATABASE)
    check = Check(connection)
    notes.append(check.about([pair for pair in parts["test"] if pair.origin == "geography"]))
    seen = {(pair.prompt, pair.completion) for pair in parts["train"]}
    again = sum((pair.prompt, pair.completion) in seen for pair in parts["test"])
    queries = {pair.completion for pair in parts["train"]}
    known_queries = sum(pair.completion in queries for pair in parts["test"])
    notes.append(
        f"of the {len(parts['test'])} questions to test, {known_queries} ask for a query that is, values and all, in "
        f"the training part, and {again} are in it word for word"
    )
    title = "question → SQL (Geography and ATIS)"
    return Task("sql", title, parts["train"], parts["dev"], parts["test"], check, ("geography",), notes=tuple(notes))


class Check:
    """Whether a query has the result of the gold query on a database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.answers: dict[str, database.Answer] = {}

    def gold(self, query: str) -> database.Answer:
        """The gold query's answer, found once."""
        if query not in self.answers:
            self.answers[query] = database.run(self.connection, query)
        return self.answers[query]

    def __call__(self, wanted: str, written: str) -> bool:
        """Whether what was written gives the same rows; not where the gold query itself cannot be run."""
        return database.same(self.gold(wanted), database.run(self.connection, written))

    def about(self, pairs: Sequence[Pair]) -> str:
        """How many of the gold queries run, and how many give nothing."""
        answers = [self.gold(pair.completion) for pair in pairs]
        failing = sum(answer.error is not None for answer in answers)
        empty = sum(answer.error is None and answer.says_nothing() for answer in answers)
        return (
            f"of the {len(pairs)} gold queries that can be run, {failing} fail on SQLite (nothing written for them can "
            f"be right) and {empty} give no row or NULL alone"
        )


def _pairs(path: Path, origin: str) -> Iterator[tuple[str, Pair]]:
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            examples = {variable["name"]: variable["example"] for variable in entry["variables"]}
            for sentence in entry["sentences"]:
                own = {name: value for name, value in sentence["variables"].items() if value}
                question = filled(sentence["text"], {**examples, **own})
                query = plain(filled(entry["sql"][0], {**examples, **own}))
                yield sentence["question-split"], Pair(f"-- {question}\n", query, origin)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LorakitError(f"{path} is not the set of the text2sql collection: {error!r}") from None


def filled(text: str, values: dict[str, str]) -> str:
    """The text with its variables replaced by their values."""
    return re.sub(r"\b\w+\d\b", lambda found: values.get(found[0], found[0]), text)


def plain(query: str) -> str:
    """In lower case but for its strings, aliases as table and number, one space between words."""
    parts = _QUOTED.split(" ".join(query.split()))
    return "".join(part if at % 2 else re.sub(r"alias(\d)", r"\1", part.lower()) for at, part in enumerate(parts))
