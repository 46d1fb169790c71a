"""VQA's soft accuracy with its answer normalization, and plain exact match.

Source: Antol et al. 2015 and the rules of visualqa.org/evaluation. With four or more gold answers an answer scores the
mean, over all ways to leave one of them out, of min(1, matches among the others / 3): their ten people vote. With fewer
it is right where it matches any. Both sides are always normalized (the challenge's own script leaves questions alone on
which all people agree).
"""

import re
from collections.abc import Sequence

# Fewest gold answers with which an answer that all people give can score 1 when one of them is left out.
MIN_VOTES = 4
VOTES_FOR_FULL_SCORE = 3

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

# Written without their apostrophe they are the same answer. Words that then mean something else are left out (we're).
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
    """Mean over questions, in [0, 1].

    Args:
        outputs: what the model wrote; its first line counts.
        golds: the gold answers of each, at least one.
    """
    return sum(_vote(normalize(first_line(o)), list(map(normalize, g))) for o, g in _rows(outputs, golds)) / len(golds)


def exact_match(outputs: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Share of outputs that are one of their gold answers, white space around both left out."""
    return sum(o.strip() in {gold.strip() for gold in g} for o, g in _rows(outputs, golds)) / len(golds)


def normalize(answer: str) -> str:
    """The answer without punctuation, articles and capitals, with digits for words up to ten, apostrophes put back."""
    given = text = " ".join(answer.split())
    # A sign that stands beside a space anywhere is no part of a word ("red , blue"); else it parts two words.
    for sign in _SIGNS:
        beside_space = f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if beside_space or _DIGIT_COMMA.search(given) else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_APOSTROPHE_OF.get(word, word) for word in words if word not in _ARTICLES)


def first_line(text: str) -> str:
    """The first line with anything in it: what follows an answer is explanation."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _vote(answer: str, golds: list[str]) -> float:
    matches = golds.count(answer)
    if len(golds) < MIN_VOTES:
        return float(matches > 0)
    # Leaving out one that matches, of which there are `matches`, or one that does not.
    without = [min(1.0, left / VOTES_FOR_FULL_SCORE) for left in (matches - 1, matches)]
    return (matches * without[0] + (len(golds) - matches) * without[1]) / len(golds) if matches else 0.0


def _rows(outputs: Sequence[str], golds: Sequence[Sequence[str]]) -> zip:
    return zip(outputs, golds, strict=True)
