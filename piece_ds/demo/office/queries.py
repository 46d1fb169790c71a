"""A question about one table, to SQL: the prompt gives the table's columns, the answer is one SELECT."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from piece_ds.demo.office.words import CITIES, COLOURS, LAST_NAMES
from piece_ds.demo.tasks import Row


@dataclass(frozen=True)
class Table:
    """A table that can be asked about.

    Attributes:
        name: a plural.
        key: column that answers "which".
        texts: text columns -> their values.
        numbers: number columns -> values to ask about.
    """

    name: str
    key: str
    texts: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, ...]]

    def schema(self) -> str:
        """Return the table as the prompt shows it: staff(name, city, team, salary, age)."""
        return f"{self.name}({', '.join((self.key, *self.texts, *self.numbers))})"


_CITIES = tuple(CITIES)
TABLES = (
    Table(
        "staff",
        "name",
        {"city": _CITIES, "team": ("sales", "legal", "design", "support", "finance")},
        {"salary": tuple(range(2000, 9000, 100)), "age": tuple(range(20, 65))},
    ),
    Table("flights", "code", {"origin": _CITIES, "target": _CITIES}, {"price": tuple(range(40, 900, 10))}),
    Table("cars", "plate", {"colour": tuple(COLOURS), "owner": tuple(LAST_NAMES)}, {"year": tuple(range(1990, 2025))}),
    Table("hotels", "name", {"city": _CITIES}, {"rooms": tuple(range(10, 400, 5)), "stars": (1, 2, 3, 4, 5)}),
    Table("shops", "id", {"city": _CITIES, "manager": tuple(LAST_NAMES)}, {"profit": tuple(range(1000, 90000, 500))}),
    Table("invoices", "number", {"client": tuple(LAST_NAMES), "city": _CITIES}, {"total": tuple(range(50, 5000, 25))}),
    Table(
        "books",
        "title",
        {"author": tuple(LAST_NAMES)},
        {"pages": tuple(range(80, 900, 10)), "price": tuple(range(5, 80))},
    ),
    Table("rooms", "number", {"building": ("north", "south", "east", "west")}, {"seats": tuple(range(2, 200))}),
)


def question_to_sql(random: Random) -> Row:
    """Return a row with one of seven kinds of question about one of TABLES, in one of several wordings."""
    table = random.choice(TABLES)
    question, answer = random.choice(_KINDS)(table, random)
    return {"prompt": f"{table.schema()}\n{question}\nSQL:", "answer": answer}


def _where_text(table: Table, random: Random) -> tuple[str, str]:
    column, value = _text(table, random)
    question = random.choice(
        (
            f"Which {table.name} have the {column} {value}?",
            f"List all {table.name} whose {column} is {value}.",
            f"Show me the {table.name} with {column} {value}.",
        )
    )
    return question, f"SELECT {table.key} FROM {table.name} WHERE {column} = '{value}'"


def _where_number(table: Table, random: Random) -> tuple[str, str]:
    column, value = _number(table, random)
    said, sign = random.choice((("more than", ">"), ("above", ">"), ("over", ">"), ("less than", "<"), ("below", "<")))
    question = random.choice(
        (
            f"Which {table.name} have a {column} {said} {value}?",
            f"List the {table.name} with {column} {said} {value}.",
            f"Find {table.name} whose {column} is {said} {value}.",
        )
    )
    return question, f"SELECT {table.key} FROM {table.name} WHERE {column} {sign} {value}"


def _count(table: Table, random: Random) -> tuple[str, str]:
    column, value = _text(table, random)
    question = random.choice(
        (
            f"How many {table.name} have the {column} {value}?",
            f"Count the {table.name} whose {column} is {value}.",
            f"What is the number of {table.name} with {column} {value}?",
        )
    )
    return question, f"SELECT COUNT(*) FROM {table.name} WHERE {column} = '{value}'"


def _aggregate(table: Table, random: Random) -> tuple[str, str]:
    column = random.choice(list(table.numbers))
    said, function = random.choice(
        (
            ("average", "AVG"),
            ("mean", "AVG"),
            ("highest", "MAX"),
            ("largest", "MAX"),
            ("lowest", "MIN"),
            ("smallest", "MIN"),
        )
    )
    question = random.choice(
        (f"What is the {said} {column} of all {table.name}?", f"Give the {said} {column} of {table.name}.")
    )
    return question, f"SELECT {function}({column}) FROM {table.name}"


def _aggregate_where(table: Table, random: Random) -> tuple[str, str]:
    (column, value), number = _text(table, random), random.choice(list(table.numbers))
    said, function = random.choice((("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")))
    question = random.choice(
        (
            f"What is the {said} {number} of {table.name} with {column} {value}?",
            f"For {column} {value}, what is the {said} {number} of the {table.name}?",
        )
    )
    return question, f"SELECT {function}({number}) FROM {table.name} WHERE {column} = '{value}'"


def _first_by(table: Table, random: Random) -> tuple[str, str]:
    column, limit = random.choice(list(table.numbers)), random.randint(2, 20)
    said, order = random.choice((("highest", " DESC"), ("largest", " DESC"), ("lowest", ""), ("smallest", "")))
    question = random.choice(
        (
            f"Which {limit} {table.name} have the {said} {column}?",
            f"Show the {limit} {table.name} with the {said} {column}.",
        )
    )
    return question, f"SELECT {table.key} FROM {table.name} ORDER BY {column}{order} LIMIT {limit}"


def _two_conditions(table: Table, random: Random) -> tuple[str, str]:
    (column, value), (number, limit) = _text(table, random), _number(table, random)
    said, sign = random.choice((("more than", ">"), ("above", ">"), ("less than", "<"), ("under", "<")))
    question = random.choice(
        (
            f"Which {table.name} with {column} {value} have a {number} {said} {limit}?",
            f"List {table.name} whose {column} is {value} and whose {number} is {said} {limit}.",
        )
    )
    where = f"WHERE {column} = '{value}' AND {number} {sign} {limit}"
    return question, f"SELECT {table.key} FROM {table.name} {where}"


_KINDS: tuple[Callable[[Table, Random], tuple[str, str]], ...] = (
    _where_text,
    _where_number,
    _count,
    _aggregate,
    _aggregate_where,
    _first_by,
    _two_conditions,
)


def _text(table: Table, random: Random) -> tuple[str, str]:
    column = random.choice(list(table.texts))
    return column, random.choice(table.texts[column])


def _number(table: Table, random: Random) -> tuple[str, int]:
    column = random.choice(list(table.numbers))
    return column, random.choice(table.numbers[column])
