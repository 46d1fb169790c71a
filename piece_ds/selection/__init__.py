"""From scores to a mask: the budget, the distributed threshold, the selected indices."""

from piece_ds.selection.budget import num_to_select
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import Estimator, Fragment, estimator, estimator_names
from piece_ds.selection.top_k import select

__all__ = ["Estimator", "Fragment", "LastPassFilter", "estimator", "estimator_names", "num_to_select", "select"]
