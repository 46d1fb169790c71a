"""Parsers and formulas that score TRACE as the method's authors do, quirks kept, for comparison with their numbers.

Source: wanglingxiang0717/PIECE @ cc65c01, eval/evaluations, with formulas from BeyonderXX/TRACE. Any capital A-D counts
    as a choice ("Based on" is B). Numbers are compared as text ("11." is not "11"). BLEU is a mean over rows without
    smoothing. ROUGE-L counts every word once. The edit similarity is difflib's, in whole percents.

One thing differs: a text of only full stops ends the authors' run with an error, and scores 0 here.
"""

import re
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_STANCES = {"支持": "A", "反对": "B", "中立": "C"}
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def first_choice(text: str) -> str | None:
    """Return the first capital A-D anywhere in text, as for FOMC and ScienceQA."""
    return next((character for character in text if character in "ABCD"), None)


def stance(text: str) -> str | None:
    """Return a capital A-D among the first four characters, else a Chinese stance at the start, as for C-STANCE."""
    return first_choice(text[:4]) or _STANCES.get(text[:2])


def first_number(text: str) -> str | None:
    """Return the first number as it is written, as for NumGLUE: "1,000" gives "1", and "11." keeps its point."""
    found = _NUMBER.search(text)
    return found.group(0) if found else None


def code_line(text: str) -> str:
    """Return what follows the last <EOL>, with the placeholders of literals filled in, as for Py150."""
    return with_literals(text.rsplit("<EOL>", 1)[-1])


def with_literals(code: str) -> str:
    """Return code with <NUM_LIT> as 0, <STR_LIT> and <CHAR_LIT> as nothing, and <STR_LIT:x> as x."""
    for mark, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(mark, value)
    for kind, value in _LITERAL.findall(code):
        code = code.replace(f"<{kind}_LIT:{value}>", value)
    return code


def bleu_4(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of nltk's sentence BLEU, in [0, 1].

    Weights are uniform over 1- to 4-grams, without smoothing. Empty texts score 0.
    """
    return _bleu(outputs, golds, 4)


def bleu_1(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of nltk's sentence BLEU over single words, in [0, 1]."""
    return _bleu(outputs, golds, 1)


def _bleu(outputs: Sequence[str], golds: Sequence[str], order: int) -> float:
    from nltk.translate.bleu_score import sentence_bleu  # slow to import

    total = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of every row without a common 4-gram
        for output, gold in zip(outputs, golds, strict=True):
            if output and gold:
                total += float(sentence_bleu([_bleu_tokens(gold)], _bleu_tokens(output), [1 / order] * order))
    return total / len(outputs)


def rouge_l(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of ROUGE-L F, as the package rouge 1.0.1 computes it, in [0, 1). Empty texts score 0.

    The gold text is the hypothesis and the output the reference: the authors pass them in this order.
    """
    pairs = zip(outputs, golds, strict=True)
    return sum(_rouge_l(gold, output) for output, gold in pairs) / len(outputs)


def edit_similarity(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of difflib's ratio, in whole percents as fuzzywuzzy rounds it. Empty texts score 0."""
    total = 0
    for output, gold in zip(outputs, golds, strict=True):
        if output and gold:
            total += round(100 * SequenceMatcher(None, output, gold).ratio())
    return total / len(outputs) * 0.01


def _bleu_tokens(text: str) -> list[str]:
    return [token for token in re.split(r"\s|\.", text) if token]


def _rouge_l(hypothesis: str, reference: str) -> float:
    """Return F1 over distinct words.

    The words that count are those in a longest common subsequence of any sentence of one text and any of the other.
    """
    hypotheses, references = _sentences(hypothesis), _sentences(reference)
    if not hypotheses or not references:
        return 0.0
    common: set[str] = set()
    for one in references:
        for other in hypotheses:
            common |= _common_words(one, other)
    precision = len(common) / len({word for words in hypotheses for word in words})
    recall = len(common) / len({word for words in references for word in words})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Return the words of each piece between full stops. A piece of white space is one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(first: list[str], second: list[str]) -> set[str]:
    """Return the words of the longest common subsequence. Ties in the table step back in second."""
    # Fill the table of lengths, then walk back from its end.
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        row, above = [0], lengths[-1]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    found, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.add(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
