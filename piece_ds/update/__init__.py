"""Train selected weights while every other weight keeps its bits."""

from piece_ds.update.attach import attach, prepare_compact
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate
from piece_ds.update.step_scale import ScaledSteps, StepScale, general_step_scale, scale_steps

__all__ = [
    "CompactUpdate",
    "MaskedUpdate",
    "ScaledSteps",
    "StepScale",
    "attach",
    "general_step_scale",
    "prepare_compact",
    "scale_steps",
]
