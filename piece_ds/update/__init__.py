"""How selected weights are trained while every other weight keeps its bits."""

from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate
from piece_ds.update.modes import attach
from piece_ds.update.prepare import prepare_compact

__all__ = ["CompactUpdate", "MaskedUpdate", "attach", "prepare_compact"]
