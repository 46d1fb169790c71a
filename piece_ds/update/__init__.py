"""How selected weights are trained while every other weight keeps its bits."""

from piece_ds.update.masked import MaskedUpdate, attach

__all__ = ["MaskedUpdate", "attach"]
