"""Decide which tasks have answers that can be right or wrong, and whether an output is right.

Parsers read what a model may write around an answer ("The answer is (B)."). None of them fails on any text. They
forgive more than the parsers of the method's authors. Those take FOMC's first A-D anywhere ("Based on" counts as B) and
compare numbers as text ("11." is not "11").
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

LETTER = "letter"  # one capital letter, perhaps with reasons after it
NUMBER = "number"  # a number; a few words among the answers do no harm
WORD = "word"  # one word, compared as it stands
TEXT = "text"  # anything longer: no accuracy

# NumGLUE-cm has 3 names of months and days among 81 test answers, 62 among 1000 training answers.
MIN_NUMBER_SHARE = 0.8
MAX_WORD_LENGTH = 32  # languages without spaces: a longer "word" is a sentence

# Quotation marks, brackets and Markdown around a letter; full-width signs are made plain first.
_OPEN, _CLOSE = r"[\s\"'\u201c\u2018(\[*_]*", r"[\s\"'\u201d\u2019)\]*_]*"
_LEADING_LETTER = re.compile(rf"{_OPEN}([A-Z]){_CLOSE}(?:$|(?<=\n)|[.,:;)\]。、!])")
_CUED_LETTER = re.compile(
    rf"(?i:answer|option|choice|stance|答案|选项?|选择)[\s:=]*(?:is|was|为|是)?:?{_OPEN}([A-Z])(?![A-Za-z0-9'])"
)
# "A" and "I" are words too. Before a lower-case word they count only if that word talks about an option.
_LONE_LETTER = re.compile(r"(?<![A-Za-z0-9'])(?:([B-HJ-Z])|([AI])(?! (?!is\b|because\b|since\b)[a-z]))(?![A-Za-z0-9'])")
_LISTED_LETTER = re.compile(r"(?<![A-Za-z0-9])([A-Z])[.:)、]")
_CHINESE_STANCE = {"支持": "A", "反对": "B", "中立": "C"}  # C-STANCE: models write the word for the letter

_MINUS = "\u2212"
_NUMBER = (
    rf"[-+{_MINUS}]?\s?[$€£¥]?\s?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d*|\.\d+)?(?:(?<=[\d.])[eE][-+]?\d+)?"
)
_AHEAD = rf"(?=[-+{_MINUS}$€£¥.\s]*\d)"
_FIRST_NUMBER = re.compile(rf"{_AHEAD}(?<![\w.])({_NUMBER})", re.ASCII)
_CUED_NUMBER = re.compile(rf"(?:answer|result)\s*(?:is|was|[:=])+\s*{_AHEAD}({_NUMBER})", re.ASCII | re.I)


def answer_kind(golds: Sequence[str]) -> str:
    """Return LETTER, NUMBER, WORD or TEXT, judged only by the gold answers.

    LETTER: every answer is one capital letter, bare or followed by punctuation or a new line. NUMBER: at least
    MIN_NUMBER_SHARE are numbers and the others are single words. WORD: all are single words. TEXT: anything else.
    """
    stripped = [gold.strip() for gold in golds]
    if not stripped or not all(stripped):
        return TEXT
    if all(re.match(r"[A-Z](?:$|[.,:;)\n])", gold) for gold in stripped):
        return LETTER
    if not all(_is_word(gold) or _is_number(gold) for gold in stripped):
        return TEXT
    share = sum(map(_is_number, stripped)) / len(stripped)
    return NUMBER if share >= MIN_NUMBER_SHARE else WORD


def is_right(output: str, gold: str, kind: str) -> bool:
    """Return whether output gives the answer gold.

    Args:
        output: what the model wrote after the prompt.
        gold: the right answer.
        kind: LETTER, NUMBER or WORD.
    Raises:
        ValueError: kind is TEXT or unknown.
    """
    if kind not in _IS_RIGHT:
        raise ValueError(f"answers of kind {kind!r} are not right or wrong; kinds that are: {', '.join(_IS_RIGHT)}")
    return _IS_RIGHT[kind](output, gold)


def after_thinking(text: str) -> str:
    """Return what follows the last </think> of a reasoning model's output."""
    return text.rsplit("</think>", 1)[-1]


def parse_letter(text: str) -> str | None:
    """Return the capital letter that text answers with: at its start, after a cue ("answer is"), or standing by itself.

    A first line that lists several options repeats the prompt. It answers nothing, unless a cue follows.
    """
    # Full-width letters and signs of Chinese text become ASCII.
    text = unicodedata.normalize("NFKC", text).strip()
    cued = _CUED_LETTER.search(text)
    # Models that repeat the prompt list the options first.
    first_line = text.split("\n", 1)[0]
    if {"A", "B"} <= set(_LISTED_LETTER.findall(first_line)):
        return cued.group(1) if cued else None
    for word, letter in _CHINESE_STANCE.items():
        if text.startswith(word):
            return letter
    found = _LEADING_LETTER.match(text) or cued or _LONE_LETTER.search(text)
    return next(letter for letter in found.groups() if letter) if found else None


def parse_number(text: str) -> Decimal | None:
    """Return the number after "answer is", else the first number in text, without commas and currency signs."""
    found = _CUED_NUMBER.search(text) or _FIRST_NUMBER.search(text)
    if not found:
        return None
    plain = re.sub(r"[,\s$€£¥]", "", found.group(1)).replace(_MINUS, "-")
    try:
        return Decimal(plain)
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return None


def _letter_is_right(output: str, gold: str) -> bool:
    return parse_letter(output) == gold.strip()[:1]


def _number_is_right(output: str, gold: str) -> bool:
    if not _is_number(gold):
        return _word_is_right(output, gold)
    number = parse_number(output)
    return number is not None and number == parse_number(gold)


def _word_is_right(output: str, gold: str) -> bool:
    """Return whether the first line of output is gold, apart from white space and one full stop at its end."""
    first_line = output.strip().split("\n", 1)[0].strip()
    return gold.strip() in (first_line, first_line.removesuffix("."))


_IS_RIGHT = {LETTER: _letter_is_right, NUMBER: _number_is_right, WORD: _word_is_right}


def _is_word(text: str) -> bool:
    return len(text.split()) <= 1 and len(text) <= MAX_WORD_LENGTH


def _is_number(text: str) -> bool:
    """Return whether the whole text is one number, with at most a currency or percent sign."""
    found = _FIRST_NUMBER.match(text.strip())
    return found is not None and text.strip()[found.end() :] in ("", "%")
