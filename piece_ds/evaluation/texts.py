"""Score free texts against gold ones: BLEU-4, ROUGE-L, SARI and edit similarity, all in [0, 1], in any language.

The libraries are imported inside the functions. Some take a second to import, and most ranks and commands need none.
"""

import re
from collections import Counter
from collections.abc import Sequence

# Scripts without spaces between words. There each character counts as a word.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_MAX_ORDER = 4


def bleu_4(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return sacrebleu's corpus BLEU with exponential smoothing.

    Tokens are its 13a, or its zh for scripts without spaces.
    """
    from sacrebleu.metrics.bleu import BLEU

    # The default rule would make one token of a Chinese sentence.
    tokenize = "zh" if any(re.search(f"[{_SPACELESS}]", gold) for gold in golds) else "13a"
    return BLEU(tokenize=tokenize).corpus_score(list(outputs), [list(golds)]).score / 100


def rouge_l(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of rouge-score's ROUGE-L F1, on lower-case words of any script.

    Its own tokens are ASCII.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(golds, outputs, strict=True)
    return sum(scorer.score(gold, output)["rougeL"].fmeasure for gold, output in pairs) / len(outputs)


def edit_similarity(outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of 1 - edits / (characters of both). An edit is an insertion or a deletion."""
    from rapidfuzz import fuzz

    pairs = zip(outputs, golds, strict=True)
    return sum(fuzz.ratio(output, gold) for output, gold in pairs) / (100 * len(outputs))


def sari(sources: Sequence[str], outputs: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean over rows of SARI against one reference: how well a simplification keeps, adds and deletes words.

    Tokens are sacrebleu's 13a in lower case.

    Source: Xu et al. 2016 (aclanthology Q16-1029), with the two corrections of tensor2tensor and Hugging Face's
        `evaluate`: 0/0 is 1, and the recall of kept n-grams counts occurrences.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    texts = [[tokenize(text.lower()).split(" ") for text in column] for column in (sources, outputs, golds)]
    return sum(_sari_of_row(*row) for row in zip(*texts, strict=True)) / len(outputs)


def _sari_of_row(source: list[str], output: list[str], gold: list[str]) -> float:
    scores = [
        _sari_of_order(*(_ngrams(words, n) for words in (source, output, gold))) for n in range(1, 1 + _MAX_ORDER)
    ]
    return sum(map(sum, scores)) / (3 * _MAX_ORDER)


def _sari_of_order(source: Counter, output: Counter, gold: Counter) -> tuple[float, float, float]:
    """Return F1 of kept, precision of deleted and F1 of added n-grams of one length."""
    kept, to_keep = source & output, source & gold
    well_kept = kept & gold
    keep = _f1(
        _ratio(sum(well_kept[ngram] / kept[ngram] for ngram in well_kept), len(kept)),
        _ratio(well_kept.total(), to_keep.total()),
    )

    # Only precision for deletions: deleting too much hurts more than deleting too little.
    deleted = source - output
    well_deleted = deleted - gold
    delete = _ratio(sum(well_deleted[ngram] / deleted[ngram] for ngram in well_deleted), len(deleted))
    added, to_add = output.keys() - source.keys(), gold.keys() - source.keys()
    well_added = len(added & to_add)
    return keep, delete, _f1(_ratio(well_added, len(added)), _ratio(well_added, len(to_add)))


def _ngrams(words: list[str], order: int) -> Counter:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class _Words:
    """Tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
