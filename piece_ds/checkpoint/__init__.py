"""Files that outlive a run: masks, task deltas and statistics."""

from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.checkpoint.mask_file import check_mask_file, load_mask, save_mask
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.zero.weights import read_selected

__all__ = [
    "check_mask_file",
    "load_mask",
    "load_statistics",
    "read_selected",
    "save_delta",
    "save_mask",
    "save_statistics",
]
