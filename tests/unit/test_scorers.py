"""Scorers: the authors' parsers and formulas branch by branch, the clean ones by hand, and texts that hurt."""

import json
import math
import os
import re
import warnings
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from nltk.translate.bleu_score import sentence_bleu
from rouge import Rouge

from piece_ds.evaluation import authors, texts
from piece_ds.evaluation.predictions import read_predictions, rescore, write_predictions
from piece_ds.evaluation.scorers import choose_scorers, get_scorer, scorer_names
from piece_ds.runtime.errors import UserError

TRACE = Path(os.environ.get("PIECE_DS_SHARED", Path(__file__).parents[3] / "shared")) / "trace"
GENERATING = [name for name in scorer_names() if get_scorer(name).generates]
PROMPT = "Give it.\n\nParagraph:\nDie Katze sass lange auf der Matte.\n\nSimplification:"

# (output, gold): equal, near, without a common word, with sentences, repeats, line breaks, cut off inside a word.
PAIRS = [
    ("Die Katze sass auf der Matte.", "Die Katze sass auf der Matte."),
    ("Die Katze sass auf der Matte. Sie schlief. Die Katze", "Eine Katze sass auf der Matte. Dort schlief sie lange."),
    ("one two three four five", "five four three two one"),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"),
    ("nothing alike", "ganz und gar anders"),
    ("the the the the the", "the cat. the dog"),
    ("a\nb  c\td", "a b c d e"),
    ("Summary: The motion carr", "The motion carries 7-0"),
    (" . a. b . ", "a. b"),
    ("x " * 300 + "y", "y " + "x " * 250),
]
# Whether an answer is in the first few tokens, by our formulas and by the authors'.
SHORT = {
    "letter": (True, True), "reasons": (True, False), "stance": (True, True), "number": (True, True),
    "word": (True, True), "exact": (False, False), "text": (False, False), "simplification": (False, False),
    "code": (False, False), "vqa": (True, True), "caption": (False, False), "loss": (True, True),
}  # fmt: skip
HURTING = [
    "",
    " ",
    ".",
    "...",
    "\n.\n",
    "\x00\ufffd",
    "</think>",
    "<think>never ends",
    "<EOL>",
    "<STR_LIT:",
    PROMPT,
    PROMPT + PROMPT,
    "A. dovish, B. hawkish",
    "1e999999999",
    "(" * 2000,
    "支",
    "🐈" * 50,
    "\ud800",
]


def test_answers_are_generated_as_long_as_their_scorer_reads() -> None:
    scorers = {name: get_scorer(name) for name in scorer_names()}
    assert {name: (one.is_short, one.is_short_for_authors) for name, one in scorers.items()} == SHORT
    assert [name for name, one in scorers.items() if one.takes_many] == ["vqa", "caption"]


@pytest.mark.parametrize(
    ("output", "letter"),
    [("C", "C"), ("Based on", "B"), ("the answer is D.", "D"), ("e, E", None), ("", None), ("\nA", "A")],
)
def test_authors_take_any_capital_as_a_choice(output: str, letter: str | None) -> None:
    assert authors.first_choice(output) == letter


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        ("选择 D", "D"),
        ("答案选择是A", None),
        ("支持", "A"),
        ("反对这个", "B"),
        ("中立", "C"),
        ("不支持", None),
        ("支持B", "B"),
        ("支", None),
        ("", None),
    ],
)
def test_authors_take_a_stance_from_the_start(output: str, letter: str | None) -> None:
    assert authors.stance(output) == letter


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("11", "11"),
        ("11.", "11."),
        ("1,000", "1"),
        ("it is -3.5e2 m", "-3.5e2"),
        (".5", ".5"),
        ("+7", "+7"),
        ("no", None),
    ],
)
def test_authors_take_numbers_as_text(output: str, number: str | None) -> None:
    assert authors.first_number(output) == number


def test_authors_code_is_what_follows_the_last_line_mark() -> None:
    assert authors.code_line("a <EOL> b = <STR_LIT> + <NUM_LIT> <CHAR_LIT>") == " b =  + 0 "
    assert authors.code_line("f ( <STR_LIT:utf-8> , <NUM_LIT:1> , <CHAR_LIT:x\ny> )") == "f ( utf-8 , 1 , x\ny )"
    assert authors.code_line("x <EOL>") == ""


def oracle_bleu(output: str, gold: str) -> float:
    tokens = [[token for token in re.split(r"\s|\.", text) if token] for text in (gold, output)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sentence_bleu([tokens[0]], tokens[1], (0.25,) * 4)


@pytest.mark.parametrize(("output", "gold"), PAIRS[:-1])
def test_authors_rouge_is_that_of_the_package_they_use(output: str, gold: str) -> None:
    expected = Rouge(metrics=["rouge-l"]).get_scores(gold, output, avg=True)["rouge-l"]["f"]
    assert authors.rouge_l([output], [gold]) == expected


def test_authors_formulas_are_means_over_all_rows() -> None:
    """Empty texts count in the denominator; full stops alone, which end the authors' run, count as 0."""
    outputs, golds = [*(output for output, _ in PAIRS), "", "..."], [*(gold for _, gold in PAIRS), "a b", "a b"]
    bleu = sum(oracle_bleu(output, gold) for output, gold in PAIRS) / len(outputs)
    assert authors.bleu_4(outputs, golds) == pytest.approx(bleu, rel=1e-12)
    assert authors.rouge_l(["a", "", "..."], ["a", "b", "c"]) == pytest.approx(1 / 3, abs=1e-8)
    percents = [round(100 * SequenceMatcher(None, output, gold).ratio()) for output, gold in PAIRS]
    found = authors.edit_similarity(outputs[:-1], golds[:-1])
    assert found == pytest.approx(sum(percents) / 100 / (len(PAIRS) + 1), rel=1e-12)
    stripped = [output.strip() for output in outputs]
    expected = (authors.bleu_4(stripped, golds) + authors.rouge_l(stripped, golds)) / 2
    assert get_scorer("text").score(outputs, golds, outputs, "authors")["score"] == expected


def test_authors_accuracies_by_hand() -> None:
    def score(name: str, outputs: list[str], golds: list[str]) -> float:
        return get_scorer(name).score(outputs, golds, outputs, "authors")["score"]

    assert score("letter", [" B\n", "Based on it: A", "none", "<think>A</think>C"], ["B", "A", "C", "C"]) == 0.5
    assert score("reasons", ["B\nbecause", "The best is", ""], ["B\nsince A", "A\nas", "A\nx"]) == pytest.approx(1 / 3)
    assert score("stance", ["支持", "我反对", "C。"], ["A", "B", "C"]) == pytest.approx(2 / 3)
    assert score("number", ["11.", "11", "Friday", "5 apples"], ["11", "11", "Friday", "5"]) == 0.5
    assert score("word", ["dog", "dog.", ""], ["dog", "dog", "x"]) == pytest.approx(1 / 3)
    assert score("code", ["x <EOL> a = 0", ""], ["a = <NUM_LIT>", "b"]) == 0.91 / 2


def test_clean_scores_by_hand() -> None:
    assert texts.edit_similarity(["abcd", ""], ["abc", "x"]) == pytest.approx((6 / 7) / 2)
    assert texts.rouge_l(["für die Katze", "支持A"], ["für den Hund", "反对A"]) == pytest.approx(1 / 3)
    assert texts.bleu_4(["a b c d e"], ["a b c d e"]) == pytest.approx(1.0)
    assert texts.bleu_4(["我们反对这个计划"], ["我们反对这个计划"]) == pytest.approx(1.0)
    assert get_scorer("code").score(["\n x = 0 <EOL> y"], ["x = <NUM_LIT> "], ["?"])["score"] == 1.0
    assert get_scorer("exact").score(['{"a": 1} ', '{"a": 1} b'], ['{"a": 1}'] * 2, ["?"] * 2)["score"] == 0.5
    assert get_scorer("number").score(["<think>7</think>The answer is 1,000."], ["1000"], ["?"])["score"] == 1.0


@pytest.mark.parametrize(
    ("source", "output", "gold", "expected"),
    [
        (
            "About 95 species are currently accepted .",
            "About 95 you now get in .",
            "95 species are now accepted .",
            None,
        ),
        ("a b", "a b", "a b", 1.0),
        ("a b c d e", "a b c d e", "x y z", None),
        ("the cat sat", "the cat sat", "the cat sat", 1.0),
        ("a a b c c", "a a c d d", "a a b d", None),  # words that come twice
        ("a b a b a", "a b a", "b a b", None),
    ],
)
def test_sari_equals_its_definition(source: str, output: str, gold: str, expected: float | None) -> None:
    """Against the published formula, written out with plain dictionaries."""
    found = texts.sari([source], [output], [gold])
    assert found == pytest.approx(oracle_sari(source, output, gold), rel=1e-12)
    if expected is not None:
        assert found == expected


def oracle_sari(source: str, output: str, gold: str) -> float:
    def grams(text: str, n: int) -> dict[tuple[str, ...], int]:
        words, found = text.lower().split(" "), {}
        for i in range(len(words) - n + 1):
            found[tuple(words[i : i + n])] = found.get(tuple(words[i : i + n]), 0) + 1
        return found

    def f1(p: float, r: float) -> float:
        return 0.0 if p + r == 0 else 2 * p * r / (p + r)

    totals = []
    for n in range(1, 5):
        s, c, r = grams(source, n), grams(output, n), grams(gold, n)
        kept = {g: min(s[g], c[g]) for g in s if g in c}
        good = {g: min(k, r[g]) for g, k in kept.items() if g in r}
        possible = sum(min(s[g], r[g]) for g in s if g in r)
        precision = sum(good[g] / kept[g] for g in good) / len(kept) if kept else 1
        keep = f1(precision, sum(good.values()) / possible if possible else 1)
        gone = {g: s[g] - c.get(g, 0) for g in s if s[g] > c.get(g, 0)}
        right = {g: k - r.get(g, 0) for g, k in gone.items() if k > r.get(g, 0)}
        delete = sum(right[g] / gone[g] for g in right) / len(gone) if gone else 1
        added, wanted = set(c) - set(s), set(r) - set(s)
        add = f1(len(added & wanted) / len(added) if added else 1, len(added & wanted) / len(wanted) if wanted else 1)
        totals.append((keep + delete + add) / 3)
    return sum(totals) / 4


def test_sari_stands_beside_and_takes_the_paragraph_alone() -> None:
    outputs, golds = ["Die Katze sass auf der Matte."], ["Die Katze sass dort."]
    clean = get_scorer("simplification").score(outputs, golds, [PROMPT])
    paragraph = "Die Katze sass lange auf der Matte."
    assert clean["sari"] == texts.sari([paragraph], outputs, golds)
    assert list(clean) == ["score", "bleu_4", "rouge_l", "sari"]
    by_authors = get_scorer("simplification").score(outputs, golds, [PROMPT], "authors")
    assert by_authors["sari"] == texts.sari([PROMPT], outputs, golds)


@pytest.mark.parametrize("scoring", ["clean", "authors"])
@pytest.mark.parametrize("name", GENERATING)
def test_no_text_breaks_a_scorer(name: str, scoring: str) -> None:
    golds = {"number": "11", "text": "Ein Satz.", "simplification": "Ein Satz.", "code": "a = <STR_LIT>"}
    gold = golds.get(name, "A")
    for output in HURTING:
        for measure in get_scorer(name).score([output], [gold], [PROMPT], scoring).values():
            assert 0.0 <= measure <= 1.0
    everything = get_scorer(name).score(HURTING, [gold] * len(HURTING), [PROMPT] * len(HURTING), scoring)
    assert 0.0 <= everything["score"] <= 1.0
    right = get_scorer(name).score([gold], [gold], [PROMPT], scoring)["score"]
    assert right > everything["score"]


def test_nothing_to_score_is_nan_and_bad_calls_are_refused() -> None:
    assert math.isnan(get_scorer("text").score([], [], [])["score"])
    with pytest.raises(ValueError, match="2 outputs, 1 golds"):
        get_scorer("text").score(["a", "b"], ["a"], ["?"])
    with pytest.raises(ValueError, match="scoring of loss"):
        get_scorer("loss").score(["a"], ["a"], ["?"])


def test_scorers_come_from_the_flag_then_trace_then_the_answers() -> None:
    tasks = [("FOMC", ["x y"]), ("mine", ["A", "B"]), ("sums", ["1", "2"]), ("story", ["once upon a time"])]
    expected = {"FOMC": "letter", "mine": "letter", "sums": "number", "story": "text"}
    assert choose_scorers(tasks) == expected
    assert choose_scorers(tasks, "story=loss, FOMC = word") == {**expected, "story": "loss", "FOMC": "word"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("mine=txet", "did you mean 'text'"),
        ("mnie=text", "did you mean 'mine'"),
        ("mine", "expected TASK=NAME"),
        ("mine=text,mine=word", "each task once"),
        ("=text", "expected TASK=NAME"),
    ],
)
def test_bad_scorers_are_refused(flag: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?i){message}"):
        choose_scorers([("mine", ["A"])], flag)


def test_predictions_are_read_back_and_scored_again(tmp_path: Path) -> None:
    path = tmp_path / "before" / "FOMC.jsonl"
    rows = (["p\u2028", PROMPT], ["B", "A"], ["Based", "A"])
    write_predictions(path, *rows)
    assert read_predictions(path) == rows
    assert rescore(path) == {"score": 0.5}
    assert rescore(path, scoring="authors") == {"score": 1.0}
    assert "bleu_4" in rescore(path, "text")
    path.write_text('{"prompt": "a", "answer": 1, "output": "b"}\n')
    with pytest.raises(UserError, match="row 1: expected texts"):
        rescore(path)
    with pytest.raises(UserError, match="no such file"):
        rescore(tmp_path / "x.jsonl")


@pytest.mark.skipif(not TRACE.is_dir(), reason="TRACE is not here")
@pytest.mark.parametrize(
    "task", ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
)
def test_gold_answers_of_trace_are_right_and_prompts_are_not(task: str) -> None:
    rows = json.loads((TRACE / task / "test.json").read_text())[:100]
    golds, prompts = [row["answer"] for row in rows], [row["prompt"] for row in rows]
    scorer = get_scorer(choose_scorers([(task, golds)])[task])
    assert scorer.score(golds, golds, prompts)["score"] == pytest.approx(1.0)
    assert scorer.score(prompts, golds, prompts)["score"] < 0.6
    # Not all of NumGLUE-cm's answers are numbers, and an answer of less than four words has no 4-gram.
    assert scorer.score(golds, golds, prompts, "authors")["score"] > 0.9
