"""The stream: small tasks with answers of one letter or one digit, which a rule solves and a table does not.

Each prompt has the form of a base skill ("NAME OPERAND:") with a name the base never saw, as real tasks stay
close to what a pretrained model can read. Neighbouring tasks differ in the kind of their answers, so that learning one
overwrites how the model answers the earlier ones.
"""

from random import Random
from string import ascii_lowercase

from piece_ds.embedded.rows import Row, RowMaker
from piece_ds.embedded.skills import VOWELS

WORD_LENGTH = 5
MAX_COUNT = 4
CONSONANTS = "".join(letter for letter in ascii_lowercase if letter not in VOWELS)


def largest_letter(random: Random) -> Row:
    """Which letter of a word is the last in the alphabet."""
    word = "".join(random.choices(ascii_lowercase, k=WORD_LENGTH))
    return {"prompt": f"largest {word}:", "answer": max(word)}


def vowel_count(random: Random) -> Row:
    """How many vowels a word has; every count from 0 to MAX_COUNT is equally likely."""
    num_vowels = random.randint(0, MAX_COUNT)
    letters = random.choices(VOWELS, k=num_vowels) + random.choices(CONSONANTS, k=WORD_LENGTH - num_vowels)
    random.shuffle(letters)
    return {"prompt": f"vowel count {''.join(letters)}:", "answer": str(num_vowels)}


def bigger_number(random: Random) -> Row:
    """Which of two different numbers of three digits is larger, A or B."""
    first, second = random.sample(range(100, 1000), k=2)
    return {"prompt": f"bigger {first} {second}:", "answer": "A" if first > second else "B"}


def second_letter(random: Random) -> Row:
    """Which letter of a word comes second."""
    word = "".join(random.choices(ascii_lowercase, k=WORD_LENGTH))
    return {"prompt": f"second {word}:", "answer": word[1]}


TASKS: dict[str, RowMaker] = {
    "largest-letter": largest_letter,
    "vowel-count": vowel_count,
    "bigger-number": bigger_number,
    "second-letter": second_letter,
}
