"""How selected weights are trained while every other weight keeps its bits."""

from piece_ds.update.attach import attach, prepare_compact
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate

__all__ = ["CompactUpdate", "MaskedUpdate", "attach", "prepare_compact"]
