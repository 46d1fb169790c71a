"""What a run will need, computed from shapes: bytes per rank and traffic per optimizer step."""

from piece_ds.plan.memory import MOMENTS, Term, memory_terms, peak, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import KNOWN, ModelShape, known_config, shape_of
from piece_ds.plan.traffic import Transfer, transfers

__all__ = [
    "KNOWN",
    "MOMENTS",
    "ModelShape",
    "Setting",
    "Term",
    "Transfer",
    "known_config",
    "memory_terms",
    "peak",
    "shape_of",
    "total",
    "transfers",
]
