"""The methods PIECE is compared with, on the same engine and flags."""

from piece_ds.methods.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.methods.registry import BASELINES, SELECTIONS, Selection
from piece_ds.methods.request import SelectionOptions, SelectionRequest

__all__ = [
    "BASELINES",
    "SELECTIONS",
    "Baseline",
    "EngineCallback",
    "Selection",
    "SelectionOptions",
    "SelectionRequest",
    "TaskContext",
]
