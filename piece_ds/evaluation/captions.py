"""Score captions against several references, with known libraries: BLEU-1, BLEU-4, ROUGE-L and CIDEr.

Tokens are sacrebleu's 13a in lower case. COCO's own tool uses Stanford's tokenizer, which is a Java program.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from piece_ds.evaluation import authors, texts

logger = logging.getLogger(__name__)

References = Sequence[Sequence[str]]


def bleu(outputs: Sequence[str], golds: References, order: int) -> float:
    """Return sacrebleu's corpus BLEU of 1- to order-grams, in [0, 1]. Rows may have different numbers of references."""
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, golds))
    # sacrebleu takes references by column, with None if a row has fewer.
    columns: Any = [[row[i] if i < len(row) else None for row in golds] for i in range(most)]
    metric = BLEU(lowercase=True, max_ngram_order=order, effective_order=False)
    return metric.corpus_score(list(outputs), columns).score / 100


def rouge_l(outputs: Sequence[str], golds: References) -> float:
    """Return the mean over rows of the best ROUGE-L F1 over the references."""
    pairs = zip(outputs, golds, strict=True)
    return sum(max(texts.rouge_l([output], [gold]) for gold in row) for output, row in pairs) / len(outputs)


def cider(outputs: Sequence[str], golds: References) -> float | None:
    """Return pycocoevalcap's CIDEr-D divided by 10, in [0, 1]; None if the package is not installed.

    0.12 is what papers print as 120. Its weights are the document frequencies in the references: for a single row it is
    0.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        logger.warning("CIDEr is left out: pip install 'piece_ds[eval]' brings pycocoevalcap")
        return None
    own = {row: [_tokens(output)] for row, output in enumerate(outputs)}
    references = {row: [_tokens(gold) for gold in of_row] for row, of_row in enumerate(golds)}
    return float(Cider().compute_score(references, own)[0]) / 10


def measures(outputs: Sequence[str], golds: References) -> dict[str, float]:
    """Return all measures by name. The score is (BLEU-4 + ROUGE-L) / 2, as for other texts."""
    found = {"bleu_1": bleu(outputs, golds, 1), "bleu_4": bleu(outputs, golds, 4), "rouge_l": rouge_l(outputs, golds)}
    consensus = cider(outputs, golds)
    found |= {} if consensus is None else {"cider": consensus}
    return {"score": (found["bleu_4"] + found["rouge_l"]) / 2, **found}


def measures_of_authors(outputs: Sequence[str], golds: References) -> dict[str, float]:
    """Return the authors' BLEU-1, BLEU-4 and ROUGE-L: the mean over rows of the best over the references. No CIDEr."""

    def best(formula: Callable[[Sequence[str], Sequence[str]], float]) -> float:
        pairs = zip(outputs, golds, strict=True)
        return sum(max(formula([output], [gold]) for gold in row) for output, row in pairs) / len(outputs)

    found = {"bleu_1": best(authors.bleu_1), "bleu_4": best(authors.bleu_4), "rouge_l": best(authors.rouge_l)}
    return {"score": (found["bleu_4"] + found["rouge_l"]) / 2, **found}


def _tokens(text: str) -> str:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower())
