"""VQA's soft accuracy against hand numbers, and captions against their libraries' definitions."""

import math
from pathlib import Path

import pytest

from piece_ds.evaluation import captions, vqa
from piece_ds.evaluation.predictions import read_predictions, rescore, write_predictions
from piece_ds.evaluation.scorers import choose_scorers, get_scorer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("the red, blue", "red blue"),
        ("A man", "man"),
        ("none", "0"),
        ("1,000", "1000"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("red/blue", "red blue"),
        ("well", "well"),
        ("3.5", "3.5"),
        ("yes\n", "yes"),
        ("T-shirt", "t shirt"),
        ("ten  of\tthe", "10 of"),
        ("what?", "what"),
        ("", ""),
        ("an the a", ""),
        ("red-/blue", "red blue"),
        ("1,000/day", "1000day"),
    ],
)
def test_answers_are_normalized_as_the_benchmark_says(answer: str, normal: str) -> None:
    assert vqa.normalize(answer) == normal


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten_people_by_hand(matches: int, score: float) -> None:
    """(m min(1, (m - 1) / 3) + (10 - m) min(1, m / 3)) / 10."""
    golds = ["Two"] * matches + [f"x{i}" for i in range(10 - matches)]
    assert vqa.soft_accuracy(["2."], [golds]) == pytest.approx(score)


def test_few_gold_answers_are_each_right() -> None:
    assert vqa.soft_accuracy(["a cat", "dog", "no"], [["cat"], ["cat", "Dog"], ["yes"]]) == pytest.approx(2 / 3)
    assert vqa.exact_match(["a cat", " dog\n", "Dog"], [["cat"], ["cat", "dog"], ["dog"]]) == pytest.approx(1 / 3)


def test_only_the_first_line_answers() -> None:
    assert vqa.soft_accuracy(["\n yes \nbecause it is"], [["yes"]]) == 1.0


def test_the_registry_gives_lists_to_scorers_that_take_many_and_one_answer_to_others() -> None:
    golds = [["2", "two", "2"], "3"]
    assert get_scorer("vqa").score(["two", "4"], golds, ["", ""]) == {"score": 0.5, "exact_match": 0.5}
    assert get_scorer("number").score(["2", "3"], golds, ["", ""]) == {"score": 1.0}


def test_tasks_about_images_get_vqa_captions_or_letters() -> None:
    tasks = [("count", ["2", "3"]), ("caption", [["a man rides a brown horse"] * 2]), ("pick", ["A", "B"])]
    about = {name for name, _ in tasks}
    assert choose_scorers(tasks, None, about) == {"count": "vqa", "caption": "caption", "pick": "letter"}
    for answers, scorer in (
        (["two", "a red car on a street", "left"], "vqa"),  # most are short
        (["two", "a red car on a street"], "caption"),
    ):
        assert choose_scorers([("mixed", answers)], None, {"mixed"}) == {"mixed": scorer}
    assert choose_scorers(tasks)["count"] == "number"
    assert choose_scorers(tasks, "count=number", about)["count"] == "number"


REFERENCES = [["a cat sits on a mat", "there is a cat on the mat"], ["two dogs run in a park"]]


def test_captions_equal_to_a_reference_are_perfect() -> None:
    found = captions.measures([row[-1].upper() for row in REFERENCES], REFERENCES)
    assert {name: found[name] for name in ("bleu_1", "bleu_4", "rouge_l", "score")} == pytest.approx(
        {"bleu_1": 1.0, "bleu_4": 1.0, "rouge_l": 1.0, "score": 1.0}
    )


def test_bleu_1_and_rouge_by_hand() -> None:
    """ "a cat on a hat": 4 of 5 words are in the first reference (5 < 6: brevity e^(1 - 6/5)); LCS a cat on a = 4."""
    assert captions.bleu(["a cat on a hat"], REFERENCES[:1], 1) == pytest.approx(0.8 * math.exp(1 - 6 / 5), rel=1e-6)
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert captions.rouge_l(["a cat on a hat"], REFERENCES[:1]) == pytest.approx(expected)


def test_cider_of_equal_captions_is_ten_tenths_and_of_others_nothing() -> None:
    """One reference a row: equal n-gram vectors have cosine 1 at every order, times 10, over 10."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (extra: eval)")
    references = [["a cat sits on the mat"], ["two dogs run in some park"], ["red kites fly above hills"]]
    assert captions.cider([row[0] for row in references], references) == pytest.approx(1.0)
    assert captions.cider(["x y z w", "u v q", "k l m"], references) == 0.0


def test_captions_of_the_authors_take_the_best_reference_of_each_row() -> None:
    from nltk.translate.bleu_score import sentence_bleu

    found = captions.measures_of_authors(["there is a cat on a mat", "two dogs"], REFERENCES)
    best = [
        max(sentence_bleu([gold.split()], out.split(), [1.0]) for gold in row)
        for out, row in zip(["there is a cat on a mat", "two dogs"], REFERENCES, strict=True)
    ]
    assert found["bleu_1"] == pytest.approx(sum(best) / 2)


def test_predictions_with_several_gold_answers_score_again(tmp_path: Path) -> None:
    path = tmp_path / "count.jsonl"
    write_predictions(path, ["how many?", "who?"], [["2", "two", "three"], ["me"]], ["Two", "you"])
    assert rescore(path, "vqa") == {"score": 0.5, "exact_match": 0.0}
    assert read_predictions(path)[1] == [["2", "two", "three"], "me"]
