"""Queries that a network wrote, run on SQLite: read-only, within bounds, and compared by their results.

The sets write strings in double quotes, as MySQL does. SQLite takes a double-quoted word for a column's name if there
is such a column, so they are put into single quotes before a query is run.
"""

import re
import sqlite3
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError

SECONDS = 1.0
"""What a query may take; the gold ones take milliseconds."""
ROWS = 10_000
_STEPS = 1000
"""Instructions of SQLite's machine between two looks at the clock."""
_LENGTH = 100_000
"""Bytes of a query, or of a value that it makes."""
_FUNCTIONS = frozenset({"count", "max", "min", "sum", "avg", "total", "abs", "round", "length", "lower", "upper"})
_READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ})
_PIECE = re.compile(r'"([^"]*)"')
_LAST_CLAUSE = re.compile(r"\border\s+by\b[^()]*(\([^()]*\)[^()]*)*;?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What a query gave: its rows, or why it gave none."""

    rows: tuple[tuple[Any, ...], ...] = ()
    error: str | None = None
    ordered: bool = False
    """Whether it ends in ORDER BY, so that the order of its rows is part of the answer."""

    def says_nothing(self) -> bool:
        """Whether it has no row, or NULL alone."""
        return all(value is None for row in self.rows for value in row)


def open_database(path: Path) -> sqlite3.Connection:
    """A database that nothing can be written to.

    Raises:
        LorakitError: there is no such database.
    """
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise LorakitError(f"{path} is no SQLite database that can be read: {error}") from None
    return guarded(connection)


def guarded(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection, from now on for SELECT and a few functions alone: no ATTACH, PRAGMA, extension or large value."""
    connection.text_factory = lambda text: text.decode(errors="replace")
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LENGTH)
    connection.set_authorizer(_allowed)
    return connection


def _allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action in _READS or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def run(connection: sqlite3.Connection, query: str, seconds: float = SECONDS) -> Answer:
    """The query's answer; an error of any kind, a time or a size beyond bounds is one too, and never an exception."""
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
    try:
        if len(query) > _LENGTH or "\0" in query:
            return Answer(error="no query")
        cursor = connection.execute(_single_quoted(query))
        rows = cursor.fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        return Answer(error=str(error) or type(error).__name__)
    finally:
        connection.set_progress_handler(None, 0)
    if cursor.description is None:
        return Answer(error="no query")
    if len(rows) > ROWS:
        return Answer(error=f"more than {ROWS:,} rows")
    return Answer(tuple(tuple(map(_rounded, row)) for row in rows), None, bool(_LAST_CLAUSE.search(query)))


def same(wanted: Answer, got: Answer) -> bool:
    """Whether both ran and gave equal rows: in the same order if the first says an order, else as multisets."""
    if wanted.error is not None or got.error is not None:
        return False
    if wanted.ordered:
        return wanted.rows == got.rows
    return Counter(wanted.rows) == Counter(got.rows)


def _single_quoted(query: str) -> str:
    return _PIECE.sub(lambda found: "'" + found[1].replace("'", "''") + "'", query)


def _rounded(value: Any) -> Any:
    """A mean depends on the order of its terms in the last digits."""
    return float(f"{value:.9g}") if isinstance(value, float) else value
