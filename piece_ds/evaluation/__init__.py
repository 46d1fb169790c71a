"""How well a model does: its loss, its answers, and what both say about a whole stream of tasks."""

from piece_ds.evaluation.answers import LETTER, NUMBER, TEXT, WORD, accuracy, answer_kind
from piece_ds.evaluation.generate import generate_texts, is_partitioned
from piece_ds.evaluation.loss import LossResult, count_labels, evaluate_loss
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.evaluation.measure import Measure

__all__ = [
    "LETTER",
    "NUMBER",
    "TEXT",
    "WORD",
    "LossResult",
    "Measure",
    "ResultMatrix",
    "accuracy",
    "answer_kind",
    "count_labels",
    "evaluate_loss",
    "generate_texts",
    "is_partitioned",
]
