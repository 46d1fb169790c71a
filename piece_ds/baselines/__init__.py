"""The methods PIECE is compared with, on the same engine and flags."""

from piece_ds.baselines.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.baselines.registry import BASELINES
from piece_ds.baselines.request import SelectionOptions, SelectionRequest
from piece_ds.baselines.selections import SELECTIONS, Selection

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
