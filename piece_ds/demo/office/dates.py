"""A date as people write or say it, to ISO 8601: "the third of March, nineteen eighty-four" -> 1984-03-03."""

import datetime
from collections.abc import Callable
from random import Random

from piece_ds.demo.office.words import words
from piece_ds.demo.tasks import Row

FIRST_DAY, LAST_DAY = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
MONTHS = words("January February March April May June July August September October November December")
_ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = words("- - twenty thirty forty fifty sixty seventy eighty ninety")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS |= {"twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}

# Sentences around the date, which replaces {}.
_FRAMES = (
    "{}",
    "It is due on {}.",
    "Delivered {}",
    "Invoice of {}",
    "We met on {}.",
    "Contract signed {}",
    "Please pay by {}.",
    "Valid until {}",
    "He joined us on {}.",
    "Moved to {}",
    "She was born on {}.",
    "Meeting: {}",
    "Closed from {} on",
    "The lease ends {}.",
)


def date_in_words(random: Random) -> Row:
    """Return a row with a date from FIRST_DAY to LAST_DAY, in one of 14 sentences and 14 ways to say it."""
    day = FIRST_DAY + datetime.timedelta(days=random.randrange((LAST_DAY - FIRST_DAY).days + 1))
    said = random.choice(_FORMS)(day, random.choice(_YEARS)(day.year))
    return {"prompt": f"{random.choice(_FRAMES).format(said)}\nDate:", "answer": day.isoformat()}


def cardinal(number: int) -> str:
    """Return number in words, 0 <= number < 100: "forty-two"."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def ordinal(number: int) -> str:
    """Return the ordinal of number in words, 1 <= number < 100: "twenty-first"."""
    head, hyphen, last = cardinal(number).rpartition("-")
    return f"{head}{hyphen}{_ORDINALS.get(last, f'{last}th')}"


def ordinal_digits(number: int) -> str:
    """Return the ordinal of number in digits: 1st, 2nd, 3rd, 4th, 11th, 21st."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def year_in_words(year: int) -> str:
    """Return how a year is said: nineteen eighty-four, two thousand and five, twenty nineteen."""
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {cardinal(rest)}" if rest else "")
    return f"{cardinal(century)} {'oh ' if 0 < rest < 10 else ''}{cardinal(rest) if rest else 'hundred'}"


_YEARS: tuple[Callable[[int], str], ...] = (str, year_in_words)
_FORMS: tuple[Callable[[datetime.date, str], str], ...] = (
    lambda day, year: f"the {ordinal(day.day)} of {_month(day)}, {year}",
    lambda day, year: f"{_month(day)} the {ordinal(day.day)}, {year}",
    lambda day, year: f"{_month(day)} {ordinal_digits(day.day)}, {year}",
    lambda day, year: f"the {ordinal_digits(day.day)} of {_month(day)} {year}",
    lambda day, year: f"{day.day} {_month(day)} {year}",
    lambda day, year: f"{_month(day)} {day.day}, {year}",
    lambda day, year: f"{cardinal(day.day)} {_month(day)} {year}",
)


def _month(day: datetime.date) -> str:
    return MONTHS[day.month - 1]
