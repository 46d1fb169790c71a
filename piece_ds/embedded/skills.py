"""Base skills: simple operations on short strings, so that the base model follows a prompt with an answer.

A pretrained model brings abilities that a new task builds on. These stand for them: reading a letter at a place,
ordering letters and digits, finding a vowel, counting. The tasks of the stream ask for something else by other names.
"""

from collections.abc import Callable
from random import Random
from string import ascii_lowercase, digits

from piece_ds.embedded.rows import Row, RowMaker

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


def skill_maker(name: str) -> RowMaker:
    """Row maker of one skill of SKILLS, such as {"prompt": "smallest hello:", "answer": "e"}."""
    draw, answer = (random_word, SKILLS[name]) if name in WORD_SKILLS else (random_number, SKILLS[name])

    def make_row(random: Random) -> Row:
        operand = draw(random)
        return {"prompt": f"{name} {operand}:", "answer": answer(operand)}

    return make_row


def random_word(random: Random) -> str:
    """Lower-case letters, about a third of them vowels (as in English), of a length in WORD_LENGTHS."""
    length = random.randint(*WORD_LENGTHS)
    return "".join(random.choice(VOWELS if random.random() < 0.2 else ascii_lowercase) for _ in range(length))


def random_number(random: Random) -> str:
    """Decimal digits, of a length in NUMBER_LENGTHS; the first one may be 0."""
    return "".join(random.choices(digits, k=random.randint(*NUMBER_LENGTHS)))
