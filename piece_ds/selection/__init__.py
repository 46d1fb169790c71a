"""Turn scores into a mask: the budget, the distributed threshold, the selected indices."""

from piece_ds.selection.budget import num_to_select
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import NEEDS, Estimator, Fragment
from piece_ds.selection.top_k import select_by

__all__ = ["NEEDS", "Estimator", "Fragment", "LastPassFilter", "num_to_select", "select_by"]
