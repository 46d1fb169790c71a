"""PIECE and the methods it is compared with, on the same engine and flags."""

from piece_ds.methods.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.methods.registry import METHODS, Method, find_method, register_estimator
from piece_ds.methods.request import SelectionOptions, SelectionRequest

__all__ = [
    "METHODS",
    "Baseline",
    "EngineCallback",
    "Method",
    "SelectionOptions",
    "SelectionRequest",
    "TaskContext",
    "find_method",
    "register_estimator",
]
