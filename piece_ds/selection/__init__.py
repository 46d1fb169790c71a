"""From scores to a mask: the budget, the distributed threshold, the selected indices."""

from piece_ds.selection.budget import num_to_select
from piece_ds.selection.global_topk import select

__all__ = ["num_to_select", "select"]
