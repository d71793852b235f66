"""A made-up company's questions and queries, for machines without the real sets; its database is made in memory.

A question is a wish (names, a count, a mean, the one with most) about one table under up to two conditions. A query to
test has a combination of wish, columns and conditions that no query to train on has.
"""

import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from examples.sql_and_javascript.database import guarded
from examples.sql_and_javascript.pairs import Pair, Task, apart
from examples.sql_and_javascript.questions import Check

CITIES = ("oslo", "lima", "cairo", "kyoto", "quito", "porto", "turin", "delhi")
COLOURS = ("red", "green", "blue", "black", "white")
WORDS = ("north", "river", "stone", "amber", "cedar", "falcon", "harbor", "meadow", "summit", "willow")


@dataclass(frozen=True)
class Table:
    """A table: a name column, one column of words, and columns of numbers with their ranges."""

    one: str
    many: str
    label: str
    values: tuple[str, ...]
    numbers: tuple[tuple[str, int, int], ...]


TABLES = (
    Table("worker", "workers", "city", CITIES, (("age", 20, 65), ("salary", 20, 90), ("years", 1, 30))),
    Table("product", "products", "colour", COLOURS, (("price", 1, 99), ("weight", 1, 50), ("stock", 0, 80))),
    Table("store", "stores", "city", CITIES, (("size", 10, 99), ("sales", 5, 95), ("staff", 1, 40))),
    Table("order", "orders", "colour", COLOURS, (("total", 5, 99), ("pieces", 1, 20), ("days", 1, 30))),
)
SIGNS = {">": ("above", "of more than"), "<": ("below", "of less than"), "=": ("of exactly", "equal to")}


def staff(counts: tuple[int, int, int], seed: int, fits: Callable[[Pair], bool]) -> Task:
    """Pairs to train on, for validation and to test, and the database that they are about."""
    parts = apart(_one, counts, seed, fits)
    check = Check(company(seed))
    title = "question → SQL (generated, as the real sets are not at hand)"
    return Task("sql", title, *parts, check, ("staff",), notes=(check.about(parts[2]),))


def company(seed: int) -> sqlite3.Connection:
    """The database: 60 rows in each table."""
    draw = random.Random(seed)
    connection = sqlite3.connect(":memory:")
    for table in TABLES:
        columns = ", ".join(f"{name} INTEGER" for name, _, _ in table.numbers)
        connection.execute(f"CREATE TABLE {table.many} (name TEXT, {table.label} TEXT, {columns})")
        for number in range(60):
            numbers = [draw.randint(low, high) for _, low, high in table.numbers]
            row = [f"{draw.choice(WORDS)} {number}", draw.choice(table.values), *numbers]
            connection.execute(f"INSERT INTO {table.many} VALUES (?, ?, ?, ?, ?)", row)
    connection.commit()
    return guarded(connection)


def _one(draw: random.Random) -> tuple[tuple[str, ...], Pair]:
    """A pair, and the combination that it is of."""
    table = draw.choice(TABLES)
    alias = f"{table.many}0"
    conditions = [_condition(draw, table, alias) for _ in range(draw.randint(0, 2))]
    if len({kind for kind, _, _ in conditions}) < len(conditions):
        conditions = conditions[:1]
    wish, said, chosen, ending = _wish(draw, table, alias)
    kinds = (table.many, wish, *sorted(kind for kind, _, _ in conditions))
    about = " and ".join(words for _, words, _ in conditions)
    where = " and ".join(sql for _, _, sql in conditions)
    question = f"{said} {about}".strip()
    if wish.startswith("most"):
        extreme, column = wish.split()[1:]
        inner = where.replace(alias, f"{table.many}1")
        picked = f"( select {extreme}( {table.many}1.{column} ) from {table.many} as {table.many}1"
        picked += f" where {inner} )" if inner else " )"
        where = " and ".join(part for part in (f"{alias}.{column} = {picked}", where) if part)
    query = f"select {chosen} from {table.many} as {alias}" + (f" where {where}" if where else "") + f"{ending} ;"
    return kinds, Pair(f"-- {question}\n", query, "staff")


def _wish(draw: random.Random, table: Table, alias: str) -> tuple[str, str, str, str]:
    """Its kind, its words, what is selected, and how the query ends."""
    column = draw.choice(table.numbers)[0]
    ask = draw.choice(("what is", "give me", "tell me"))
    kind = draw.choice(("names", "count", "mean", "sum", "most", "sorted"))
    if kind == "names":
        said = f"{draw.choice(('which', 'list the', 'show me all'))} {table.many}"
        return kind, said, f"{alias}.name", ""
    if kind == "count":
        said = f"{draw.choice(('how many', 'count the', 'the number of'))} {table.many}"
        return kind, said, f"count( {alias}.name )", ""
    if kind == "mean":
        word = draw.choice(("average", "mean"))
        return f"mean {column}", f"{ask} the {word} {column} of {table.many}", f"avg( {alias}.{column} )", ""
    if kind == "sum":
        return f"sum {column}", f"{ask} the sum of the {column} of {table.many}", f"sum( {alias}.{column} )", ""
    if kind == "most":
        extreme, word = draw.choice((("max", "highest"), ("max", "most"), ("min", "lowest"), ("min", "least")))
        return f"most {extreme} {column}", f"which {table.one} has the {word} {column}", f"{alias}.name", ""
    down = draw.choice((True, False))
    said = f"{draw.choice(('list', 'sort'))} the {table.many} by {column}{' downwards' if down else ''}"
    return f"sorted {column} {down}", said, f"{alias}.name", f" order by {alias}.{column}{' desc' if down else ''}"


def _condition(draw: random.Random, table: Table, alias: str) -> tuple[str, str, str]:
    """Its kind, its words, and its SQL."""
    if draw.random() < 0.4:
        value = draw.choice(table.values)
        word = "in" if table.label == "city" else draw.choice(("that are", "which are"))
        return table.label, f"{word} {value}", f'{alias}.{table.label} = "{value}"'
    column, low, high = draw.choice(table.numbers)
    sign = draw.choice(tuple(SIGNS))
    number = draw.randint(low, high)
    return f"{column} {sign}", f"with {column} {draw.choice(SIGNS[sign])} {number}", f"{alias}.{column} {sign} {number}"
