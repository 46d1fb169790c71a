"""The stream: small tasks with answers of one letter or one digit, which take a rule rather than a table.

Each prompt has the form of a base skill ("NAME OPERAND:") with a name that the base never saw. Each rule is related to
a base skill, as real tasks stay close to what a pretrained model can do. A task far from the base mostly does damage:
one with the answers A and B, which no skill has, multiplied the general loss for one seed. Neighbouring tasks differ in
the kind of their answers. So learning one overwrites how the model answers the earlier ones.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from string import ascii_lowercase, digits

VOWELS = "aeiou"
WORD_LENGTHS = (4, 6)
NUMBER_LENGTHS = (2, 5)
Skill = Callable[[str], str]

WORD_SKILLS: dict[str, Skill] = {
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "smallest": min,
    "length": lambda word: str(len(word)),
    "third": lambda word: word[2],
    "vowel": lambda word: next((letter for letter in word if letter in VOWELS), "-"),
}
NUMBER_SKILLS: dict[str, Skill] = {
    "lowest": min,
    "highest": max,
    "parity": lambda number: "even" if int(number) % 2 == 0 else "odd",
}
SKILLS = {**WORD_SKILLS, **NUMBER_SKILLS}


def random_word(random: Random) -> str:
    """Return lower-case letters, about a third of them vowels (as in English). The length is in WORD_LENGTHS."""
    length = random.randint(*WORD_LENGTHS)
    return "".join(random.choice(VOWELS if random.random() < 0.2 else ascii_lowercase) for _ in range(length))


def random_number(random: Random) -> str:
    """Return decimal digits; the first may be 0. The length is in NUMBER_LENGTHS."""
    return "".join(random.choices(digits, k=random.randint(*NUMBER_LENGTHS)))


Row = dict[str, str]
RowMaker = Callable[[Random], Row]


def skill_maker(name: str) -> RowMaker:
    """Return the row maker of one skill of SKILLS. It gives rows like {"prompt": "smallest hello:", "answer": "e"}."""
    draw, answer = (random_word, SKILLS[name]) if name in WORD_SKILLS else (random_number, SKILLS[name])

    def make_row(random: Random) -> Row:
        operand = draw(random)
        return {"prompt": f"{name} {operand}:", "answer": answer(operand)}

    return make_row


# A maker that repeats prompts this many times in a row has run out of questions.
MAX_REPEATS = 1000


def draw_rows(make_row: RowMaker, num_rows: int, random: Random) -> list[Row]:
    """Return num_rows rows of make_row with different prompts, in the order drawn.

    Args:
        make_row: draws one row from the generator it is given.
        num_rows: rows wanted.
        random: source of randomness; it is advanced.
    Returns:
        A list of num_rows new dictionaries.
    Raises:
        ValueError: make_row cannot give that many different prompts.
    """
    rows: dict[str, Row] = {}
    num_repeats = 0
    while len(rows) < num_rows:
        row = make_row(random)
        # Repeats in a row, not in total: a large space has repeats too.
        num_repeats = num_repeats + 1 if row["prompt"] in rows else 0
        if num_repeats > MAX_REPEATS:
            raise ValueError(f"only {len(rows)} of {num_rows} different prompts exist; last one: {row['prompt']!r}")
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def write_json(rows: list[Row], path: Path) -> None:
    """Write rows to path as one JSON list. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write rows to path, one JSON object per line. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


OPERAND_LENGTH = 5


def largest_letter(random: Random) -> Row:
    """Return a row that asks for the letter of a word that is last in the alphabet."""
    word = _letters(random, OPERAND_LENGTH)
    return {"prompt": f"largest {word}:", "answer": max(word)}


def odd_digit(random: Random) -> Row:
    """Return a row that asks for the first odd digit of a number. A number without one is drawn again."""
    odd: list[str] = []
    while not odd:
        number = random.choices(digits, k=OPERAND_LENGTH)
        odd = [digit for digit in number if int(digit) % 2]
    return {"prompt": f"odd digit {''.join(number)}:", "answer": odd[0]}


def end_letter(random: Random) -> Row:
    """Return a row that asks for the last letter of a word."""
    word = _letters(random, OPERAND_LENGTH)
    return {"prompt": f"end {word}:", "answer": word[-1]}


def hidden_digit(random: Random) -> Row:
    """Return a row that asks for the digit among the letters of a word, at any place."""
    digit = random.choice(digits)
    letters = _letters(random, OPERAND_LENGTH - 1)
    place = random.randint(0, len(letters))
    return {"prompt": f"digit {letters[:place]}{digit}{letters[place:]}:", "answer": digit}


def _letters(random: Random, num_letters: int) -> str:
    return "".join(random.choices(ascii_lowercase, k=num_letters))


TASKS: dict[str, RowMaker] = {
    "largest-letter": largest_letter,
    "odd-digit": odd_digit,
    "end-letter": end_letter,
    "hidden-digit": hidden_digit,
}
