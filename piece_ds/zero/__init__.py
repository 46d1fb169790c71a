"""Connect piece_ds to DeepSpeed. This is the only package that reads DeepSpeed's private names.

DeepSpeed stays unpatched in memory and on disk. Every hook is installed on one engine instance and can be removed.
A configuration with which piece_ds has not been proven is refused, with the reason.
"""

from piece_ds.zero.batch_feed import MicroBatchSource
from piece_ds.zero.gradient_term import GradientTerm, Ranges
from piece_ds.zero.statistics import StatisticsCheckpoint, collect_statistics
from piece_ds.zero.step_watch import SkippedStep, StepWatch
from piece_ds.zero.supported import adapter_for, require_trainable
from piece_ds.zero.weights import read_weight

__all__ = [
    "GradientTerm",
    "MicroBatchSource",
    "Ranges",
    "SkippedStep",
    "StatisticsCheckpoint",
    "StepWatch",
    "adapter_for",
    "collect_statistics",
    "read_weight",
    "require_trainable",
]
