"""The stream: small tasks with answers of one letter or one digit, which a rule solves and a table does not.

Each prompt has the form of a base skill ("NAME OPERAND:") with a name the base never saw, and each rule is related to a
base skill, as real tasks stay close to what a pretrained model can do. A task far from the base mostly does damage: one
with the answers A and B, which no skill has, multiplied the general loss of a seed. Neighbouring tasks differ in the
kind of their answers, so that learning one overwrites how the model answers the earlier ones.
"""

from random import Random
from string import ascii_lowercase, digits

from piece_ds.embedded.rows import Row, RowMaker

OPERAND_LENGTH = 5


def largest_letter(random: Random) -> Row:
    """Which letter of a word is the last in the alphabet."""
    word = _letters(random, OPERAND_LENGTH)
    return {"prompt": f"largest {word}:", "answer": max(word)}


def odd_digit(random: Random) -> Row:
    """Which digit of a number is the first odd one; a number without one is drawn again."""
    odd: list[str] = []
    while not odd:
        number = random.choices(digits, k=OPERAND_LENGTH)
        odd = [digit for digit in number if int(digit) % 2]
    return {"prompt": f"odd digit {''.join(number)}:", "answer": odd[0]}


def end_letter(random: Random) -> Row:
    """Which letter ends a word."""
    word = _letters(random, OPERAND_LENGTH)
    return {"prompt": f"end {word}:", "answer": word[-1]}


def hidden_digit(random: Random) -> Row:
    """Which digit stands among the letters of a word, at any place."""
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
