"""The office's tasks: repeatable, every answer right and determined by its prompt, enough different rows."""

import datetime
import json
import re
import sqlite3
from random import Random

import pytest

from piece_ds.demo.office import OFFICE_TASKS
from piece_ds.demo.office.dates import MONTHS, cardinal, ordinal, ordinal_digits, year_in_words
from piece_ds.demo.office.orders import SAID_UP_TO
from piece_ds.demo.office.queries import TABLES
from piece_ds.demo.tasks import Row, draw_rows

NUM_ROWS = 2000


@pytest.fixture(scope="module", params=list(OFFICE_TASKS))
def task(request: pytest.FixtureRequest) -> tuple[str, list[Row]]:
    return request.param, draw_rows(OFFICE_TASKS[request.param], NUM_ROWS, Random(1))


def test_rows_are_repeatable_and_come_in_many_forms(task: tuple[str, list[Row]]) -> None:
    name, rows = task
    assert rows == draw_rows(OFFICE_TASKS[name], NUM_ROWS, Random(1))
    assert len({row["prompt"] for row in rows}) == NUM_ROWS
    assert len({row["answer"] for row in rows}) > NUM_ROWS / 2
    assert max(len(row["prompt"]) + len(row["answer"]) for row in rows) < 200


def test_every_date_can_be_read_back_from_its_words() -> None:
    """By the numbers alone: all that a sentence can say of a day, a month and a year, looked up in tables."""
    days = {form(day): day for form in (str, cardinal, ordinal, ordinal_digits) for day in range(1, 32)}
    years = {form(year): year for form in (str, year_in_words) for year in range(1950, 2050)}
    assert len(years) == 200
    for row in draw_rows(OFFICE_TASKS["dates"], NUM_ROWS, Random(2)):
        text = row["prompt"].removesuffix("\nDate:")
        (month,) = [number for number, name in enumerate(MONTHS, start=1) if name in text.split() or f"{name}," in text]
        rest = re.sub(r"[,.]", " ", text).replace(MONTHS[month - 1], " ")
        spoken = " ".join(rest.split())
        year_text = max((said for said in years if re.search(rf"\b{said}\b(?!-)", spoken)), key=len)
        before_year = re.sub(rf"\b{year_text}\b(?!-)", " ", spoken)
        day_text = max((said for said in days if re.search(rf"(?<!-)\b{said}\b(?!-)", before_year)), key=len)
        assert row["answer"] == datetime.date(years[year_text], month, days[day_text]).isoformat(), text


def test_numbers_in_words() -> None:
    assert " ".join(cardinal(n) for n in (0, 7, 13, 20, 42, 99)) == "zero seven thirteen twenty forty-two ninety-nine"
    assert (
        " ".join(ordinal(n) for n in (1, 4, 12, 20, 21, 30)) == "first fourth twelfth twentieth twenty-first thirtieth"
    )
    written = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 30: "30th"}
    assert {day: ordinal_digits(day) for day in written} == written
    said = {1984: "nineteen eighty-four", 2000: "two thousand", 2005: "two thousand and five", 2019: "twenty nineteen"}
    assert {year: year_in_words(year) for year in said} == said


def test_every_order_says_what_its_json_holds() -> None:
    for row in draw_rows(OFFICE_TASKS["orders"], NUM_ROWS, Random(3)):
        order = json.loads(row["answer"])
        assert row["answer"] == json.dumps(order)
        assert list(order) == ["customer", "item", "quantity", "city"]
        spoken = [str(order["quantity"])]
        if order["quantity"] <= SAID_UP_TO:
            spoken.append(cardinal(order["quantity"]))
        sentence = row["prompt"].lower()
        assert all(order[key].lower() in sentence for key in ("customer", "item", "city")), row
        assert any(re.search(rf"\b{number}\b", sentence) for number in spoken), row


def test_every_query_runs_on_the_table_of_its_prompt() -> None:
    """SQLite runs it, and every value that the question names stands in the query."""
    database = sqlite3.connect(":memory:")
    for table in TABLES:
        assert all(isinstance(values, tuple) and len(values) > 1 for values in (table.texts | table.numbers).values())
        columns = ", ".join((table.key, *table.texts, *table.numbers))
        database.execute(f"CREATE TABLE {table.name} ({columns})")
        values = [
            [name, *(v[0] for v in table.texts.values()), *(v[0] for v in table.numbers.values())] for name in "ab"
        ]
        database.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(values[0]))})", values)
    for row in draw_rows(OFFICE_TASKS["queries"], NUM_ROWS, Random(4)):
        schema, question, _ = row["prompt"].splitlines()
        database.execute(row["answer"])
        assert schema.split("(")[0] in row["answer"]
        literals = re.findall(r"'([^']*)'|\b(\d+)\b", row["answer"])
        assert all((text or number) in question for text, number in literals), row
