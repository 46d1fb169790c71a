"""How near captions are to several references: BLEU-1, BLEU-4, ROUGE-L and CIDEr, by their libraries.

Tokens are sacrebleu's 13a in lower case; COCO's own tool uses Stanford's tokenizer, which is a Java program.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from piece_ds.evaluation import authors, texts

logger = logging.getLogger(__name__)

References = Sequence[Sequence[str]]


def bleu(outputs: Sequence[str], golds: References, order: int) -> float:
    """Corpus BLEU of 1- to order-grams of sacrebleu in [0, 1]; rows may differ in how many references they have."""
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, golds))
    columns: Any = [[row[i] if i < len(row) else None for row in golds] for i in range(most)]
    metric = BLEU(lowercase=True, max_ngram_order=order, effective_order=False)
    return metric.corpus_score(list(outputs), columns).score / 100


def rouge_l(outputs: Sequence[str], golds: References) -> float:
    """Mean over rows of the best ROUGE-L F1 over the references."""
    pairs = zip(outputs, golds, strict=True)
    return sum(max(texts.rouge_l([output], [gold]) for gold in row) for output, row in pairs) / len(outputs)


def cider(outputs: Sequence[str], golds: References) -> float | None:
    """CIDEr-D of pycocoevalcap over 10, hence in [0, 1]: 0.12 is what papers print as 120. None without the package.

    Its weights are the references' own document frequencies: of one row alone it is 0.
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
    """All of them; the score is (BLEU-4 + ROUGE-L) / 2, as for other texts."""
    found = {"bleu_1": bleu(outputs, golds, 1), "bleu_4": bleu(outputs, golds, 4), "rouge_l": rouge_l(outputs, golds)}
    consensus = cider(outputs, golds)
    found |= {} if consensus is None else {"cider": consensus}
    return {"score": (found["bleu_4"] + found["rouge_l"]) / 2, **found}


def measures_of_authors(outputs: Sequence[str], golds: References) -> dict[str, float]:
    """Mean over rows of the best over the references, of the authors' BLEU-1, BLEU-4 and ROUGE-L (no CIDEr)."""

    def best(formula: Callable[[Sequence[str], Sequence[str]], float]) -> float:
        pairs = zip(outputs, golds, strict=True)
        return sum(max(formula([output], [gold]) for gold in row) for output, row in pairs) / len(outputs)

    found = {"bleu_1": best(authors.bleu_1), "bleu_4": best(authors.bleu_4), "rouge_l": best(authors.rouge_l)}
    return {"score": (found["bleu_4"] + found["rouge_l"]) / 2, **found}


def _tokens(text: str) -> str:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower())
