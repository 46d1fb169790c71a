"""From scores to a mask: the budget, the distributed threshold, the selected indices."""

from piece_ds.selection.budget import num_to_select
from piece_ds.selection.global_topk import select
from piece_ds.selection.last_pass import LastPassFilter

__all__ = ["LastPassFilter", "num_to_select", "select"]
