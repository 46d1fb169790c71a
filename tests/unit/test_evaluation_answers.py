"""Answers: what kind a task has, and which outputs count as right."""

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from piece_ds.evaluation.answers import (
    LETTER,
    NUMBER,
    TEXT,
    WORD,
    after_thinking,
    answer_kind,
    is_right,
    parse_letter,
    parse_number,
)

TRACE = Path(os.environ.get("PIECE_DS_SHARED", Path(__file__).parents[3] / "shared")) / "trace"


@pytest.mark.parametrize(
    ("golds", "kind"),
    [
        (["A", "B", " C\n"], LETTER),
        (["B\nbecause of this", "A\nreason"], LETTER),
        (["A.", "B)"], LETTER),
        (["A word", "B"], TEXT),
        (["AB", "C"], WORD),
        (["11", "-3.5", "1,000", "$12", ".5"], NUMBER),
        (["1", "2", "3", "4", "Friday"], NUMBER),
        (["1", "2", "3", "Friday"], WORD),
        (["1", "2", "3", "4", "on Friday"], TEXT),
        (["dog", "cat"], WORD),
        (["a dog"], TEXT),
        (["这是一个没有空格的很长的中文句子所以它不是一个单词而是一个需要摘要评分的回答内容"], TEXT),
        ([""], TEXT),
        ([], TEXT),
    ],
)
def test_kind_follows_from_the_gold_answers(golds: list[str], kind: str) -> None:
    assert answer_kind(golds) == kind


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("'B'", "B"),
        ("B\nbecause A is wrong", "B"),
        ("B: because", "B"),
        ("B because of A", "B"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("I would choose option C, not A.", "C"),
        ("A good choice is B", "B"),
        ("A is right", "A"),
        ("I think it is C.", "C"),
        ("答案是C。", "C"),
        ("选B", "B"),
        ("\uff22\uff0e", "B"),  # full width
        ("支持", "A"),
        ("反对。", "B"),
        ("中立", "C"),
        ("不支持", None),
        ("The U.S. A. dovish, B. hawkish, C. neutral", None),
        ("A. dovish, B. hawkish. The answer is C", "C"),
        ("Based on the text", None),
        ("A good day", None),
        ("", None),
        (".", None),
        ("...\n", None),
        ("\x00\ufffd", None),
    ],
)
def test_letters_are_read_from_free_writing(output: str, letter: str | None) -> None:
    assert parse_letter(output) == letter


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("11", "11"),
        ("11.", "11"),
        ("1,000", "1000"),
        ("1,234,567.5 dollars", "1234567.5"),
        ("12,34", "12"),
        ("-3.5", "-3.5"),
        ("\u22124", "-4"),
        ("$12", "12"),
        ("-$12", "-12"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("It takes 7 days, not 9", "7"),
        ("3 + 4 = 7. The answer is 7", "7"),
        ("Answer: -7", "-7"),
        ("Fe2O3 weighs 160", "160"),
        ("1e99999999999999999999999", None),
        ("none", None),
        ("", None),
        ("-", None),
        ("...", None),
    ],
)
def test_numbers_are_read_from_free_writing(output: str, number: str | None) -> None:
    assert parse_number(output) == (None if number is None else Decimal(number))


def right(outputs: list[str], golds: list[str], kind: str) -> list[bool]:
    return [is_right(output, gold, kind) for output, gold in zip(outputs, golds, strict=True)]


def test_an_answer_is_what_follows_the_last_thought() -> None:
    assert after_thinking("<think>A</think>B<think>no</think>C") == "C"
    assert after_thinking("no thoughts") == "no thoughts"


def test_right_by_letter_is_the_gold_letter_before_its_reasons() -> None:
    outputs = ["B", "The answer is (A).", "", after_thinking("<think>A or B?</think>\nB")]
    assert right(outputs, ["B\nbecause", "A\nsince", "C\nas", "B\nx"], LETTER) == [True, True, False, True]


def test_right_by_number_compares_values_and_words_as_they_stand() -> None:
    outputs = ["11.0", "$1,000", "Friday.", "Monday", "12 apples", "x"]
    golds = ["11", "1000", "Friday", "Friday", "12", "3"]
    assert right(outputs, golds, NUMBER) == [True, True, True, False, True, False]


def test_right_by_word_needs_the_whole_first_line() -> None:
    outputs = [" dog\n", "dog.", "dogs", "Dog", "a dog", ""]
    assert right(outputs, ["dog"] * 6, WORD) == [True, True, False, False, False, False]


def test_text_is_not_right_or_wrong() -> None:
    with pytest.raises(ValueError, match="kind 'text' are not right or wrong"):
        is_right("A", "A", TEXT)


@pytest.mark.skipif(not TRACE.is_dir(), reason="TRACE is not here")
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("C-STANCE", LETTER),
        ("FOMC", LETTER),
        ("ScienceQA", LETTER),
        ("NumGLUE-cm", NUMBER),
        ("NumGLUE-ds", NUMBER),
        ("MeetingBank", TEXT),
        ("20Minuten", TEXT),
        ("Py150", TEXT),
    ],
)
def test_trace_tasks_have_the_kind_of_their_official_score(task: str, kind: str) -> None:
    for split in ("train", "eval", "test"):
        rows = json.loads((TRACE / task / f"{split}.json").read_text())
        golds = [row["answer"] for row in rows]
        assert answer_kind(golds) == kind
        if kind != TEXT:
            assert all(right(golds, golds, kind))
            assert sum(right([row["prompt"] for row in rows], golds, kind)) < 0.6 * len(rows)
