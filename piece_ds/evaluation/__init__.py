"""How well a model does: its loss, its answers, and what both say about a whole stream of tasks."""

from piece_ds.evaluation.generate import Decoding, Generated, generate_texts
from piece_ds.evaluation.loss import LossResult, count_labels, evaluate_loss
from piece_ds.evaluation.matrix import Measure, ResultMatrix
from piece_ds.evaluation.scorers import Scorer, choose_scorers, get_scorer, scorer_names

__all__ = [
    "Decoding",
    "Generated",
    "LossResult",
    "Measure",
    "ResultMatrix",
    "Scorer",
    "choose_scorers",
    "count_labels",
    "evaluate_loss",
    "generate_texts",
    "get_scorer",
    "scorer_names",
]
