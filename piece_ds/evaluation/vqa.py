"""VQA's soft accuracy with its answer normalization, and plain exact match.

With four or more gold answers, an answer's score is the mean, over all ways to leave out one of them, of min(1, matches
among the others / 3). The gold answers are the votes of the benchmark's ten people. With fewer gold answers, an answer
is right if it matches any. Both sides are always normalized. (The challenge's own script does not normalize if all
people agree.)

Source: Antol et al. 2015 and the rules of visualqa.org/evaluation.
"""

import re
from collections.abc import Sequence

# Fewest gold answers at which an answer that all people give scores 1 although one of them is left out.
MIN_VOTES = 4
VOTES_FOR_FULL_SCORE = 3

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

# Without their apostrophe these are the same answer. Words that would mean something else are left out (we're).
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't should've shouldn't somebody'd somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've couldn't've hadn't've it'd've
mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've
wouldn't've y'all'll y'all'd've you'd've
"""
_APOSTROPHE_OF = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
}


def soft_accuracy(outputs: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Return the mean over questions of VQA's soft accuracy, in [0, 1].

    Args:
        outputs: what the model wrote; only its first line counts.
        golds: gold answers of each question, at least one.
    """
    return sum(_vote(normalize(first_line(o)), list(map(normalize, g))) for o, g in _rows(outputs, golds)) / len(golds)


def exact_match(outputs: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Return the share of outputs that equal one of their gold answers, without white space around both."""
    return sum(o.strip() in {gold.strip() for gold in g} for o, g in _rows(outputs, golds)) / len(golds)


def normalize(answer: str) -> str:
    """Return the answer without punctuation, articles and capitals.

    Words up to ten become digits, and missing apostrophes are put back.
    """
    given = text = " ".join(answer.split())
    # A sign that has a space beside it anywhere is no part of a word ("red , blue"); otherwise it separates two words.
    for sign in _SIGNS:
        beside_space = f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if beside_space or _DIGIT_COMMA.search(given) else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_APOSTROPHE_OF.get(word, word) for word in words if word not in _ARTICLES)


def first_line(text: str) -> str:
    """Return the first line that is not empty. What follows an answer is explanation."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _vote(answer: str, golds: list[str]) -> float:
    matches = golds.count(answer)
    if len(golds) < MIN_VOTES:
        return float(matches > 0)
    # Leave out one that matches, of which there are `matches`, or one that does not.
    without = [min(1.0, left / VOTES_FOR_FULL_SCORE) for left in (matches - 1, matches)]
    return (matches * without[0] + (len(golds) - matches) * without[1]) / len(golds) if matches else 0.0


def _rows(outputs: Sequence[str], golds: Sequence[Sequence[str]]) -> zip:
    return zip(outputs, golds, strict=True)
