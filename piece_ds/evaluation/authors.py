"""Parsers and formulas as the method's authors score TRACE, quirks kept, for comparison with their numbers.

Facts from wanglingxiang0717/PIECE @ cc65c01, eval/evaluations, and BeyonderXX/TRACE, which it takes its formulas from:
any capital A-D counts as a choice ("Based on" is B), numbers are compared as text ("11." is not "11"), BLEU is a mean
over rows without smoothing, ROUGE-L counts every word once, and the edit similarity is difflib's, in whole percents.
One thing differs: a text of full stops alone ends their run with an error, and scores 0 here.
"""

import re
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_STANCES = {"支持": "A", "反对": "B", "中立": "C"}
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def first_choice(text: str) -> str | None:
    """FOMC and ScienceQA: the first capital A-D anywhere in text."""
    return next((character for character in text if character in "ABCD"), None)


def stance(text: str) -> str | None:
    """C-STANCE: a capital A-D among the first four characters, else a Chinese stance at the start."""
    return first_choice(text[:4]) or _STANCES.get(text[:2])


def first_number(text: str) -> str | None:
    """NumGLUE: the first number as it stands; "1,000" is "1" and "11." keeps its point."""
    found = _NUMBER.search(text)
    return found.group(0) if found else None


def code_line(text: str) -> str:
    """Py150: what follows the last <EOL>, with the placeholders of literals filled in."""
    return with_literals(text.rsplit("<EOL>", 1)[-1])


def with_literals(code: str) -> str:
    """code with <NUM_LIT> as 0, <STR_LIT> and <CHAR_LIT> as nothing, and <STR_LIT:x> as x."""
    for mark, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(mark, value)
    for kind, value in _LITERAL.findall(code):
        code = code.replace(f"<{kind}_LIT:{value}>", value)
    return code


def bleu_4(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Mean over rows of nltk's sentence BLEU, uniform over 1- to 4-grams, unsmoothed, in [0, 1]; empty texts give 0."""
    return _bleu(outputs, golds, 4)


def bleu_1(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """The same over single words."""
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
    """Mean over rows of ROUGE-L F as the package rouge 1.0.1 computes it, in [0, 1); empty texts give 0.

    Its arguments stand the other way round, as the authors give them: the gold text as the hypothesis.
    """
    pairs = zip(outputs, golds, strict=True)
    return sum(_rouge_l(gold, output) for output, gold in pairs) / len(outputs)


def edit_similarity(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Mean over rows of difflib's ratio, rounded to whole percents as fuzzywuzzy does; empty texts give 0."""
    total = 0
    for output, gold in zip(outputs, golds, strict=True):
        if output and gold:
            total += round(100 * SequenceMatcher(None, output, gold).ratio())
    return total / len(outputs) * 0.01


def _bleu_tokens(text: str) -> list[str]:
    return [token for token in re.split(r"\s|\.", text) if token]


def _rouge_l(hypothesis: str, reference: str) -> float:
    """F1 over distinct words: of the union, over all pairs of sentences, of their longest common subsequences."""
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
    """Words of each piece between full stops; a piece of white space is one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(first: list[str], second: list[str]) -> set[str]:
    """Words of the longest common subsequence that is found when ties step back in second."""
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
