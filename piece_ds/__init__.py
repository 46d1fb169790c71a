"""piece_ds: continual fine-tuning that trains only the most important weights, on DeepSpeed.

In a DeepSpeed loop, PIECE is two calls:

    mask = estimate_mask(engine, micro_batches, method="piece-s", ratio=0.001)
    attach(engine, mask)

and prepare_compact(model, ratio=0.001) before the engine is made, if DeepSpeed shall keep state for the selected
weights alone. In a transformers Trainer it is one: trainer.add_callback(PieceCallback(trainer)). Names are imported
when they are used, so that `import piece_ds` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "apply_delta_": "piece_ds.deltas",
    "ChainFollower": "piece_ds.deltas",
    "attach": "piece_ds.update",
    "collect_statistics": "piece_ds.zero",
    "Estimator": "piece_ds.selection",
    "estimate_mask": "piece_ds.methods.estimate",
    "general_step_scale": "piece_ds.update",
    "Fragment": "piece_ds.selection",
    "layout_of": "piece_ds.models.layout",
    "load_mask": "piece_ds.checkpoint",
    "load_statistics": "piece_ds.checkpoint",
    "Mask": "piece_ds.state.mask",
    "MicroBatches": "piece_ds.data.collate",
    "PieceCallback": "piece_ds.training.callback",
    "PieceConfig": "piece_ds.config.piece",
    "prepare_compact": "piece_ds.update",
    "register_estimator": "piece_ds.methods.registry",
    "register_peft_tuner": "piece_ds.deltas.export_adapter",
    "save_mask": "piece_ds.checkpoint",
    "save_statistics": "piece_ds.checkpoint",
    "scale_delta": "piece_ds.deltas",
    "scale_steps": "piece_ds.update",
    "sequence_loss": "piece_ds.zero.sequence_parallel",
    "select": "piece_ds.methods.estimate",
    "train": "piece_ds.cli.notebook",
    "SparseAdamW": "piece_ds.update.sparse_adamw",
    "StepScale": "piece_ds.update",
}

__all__ = [
    "ChainFollower",
    "Estimator",
    "Fragment",
    "Mask",
    "MicroBatches",
    "PieceCallback",
    "PieceConfig",
    "SparseAdamW",
    "StepScale",
    "__version__",
    "apply_delta_",
    "attach",
    "collect_statistics",
    "estimate_mask",
    "general_step_scale",
    "layout_of",
    "load_mask",
    "load_statistics",
    "prepare_compact",
    "register_estimator",
    "register_peft_tuner",
    "save_mask",
    "save_statistics",
    "scale_delta",
    "scale_steps",
    "select",
    "sequence_loss",
    "train",
]

if TYPE_CHECKING:
    from piece_ds.checkpoint.mask_file import load_mask, save_mask
    from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
    from piece_ds.cli.notebook import train
    from piece_ds.config.piece import PieceConfig
    from piece_ds.data.collate import MicroBatches
    from piece_ds.deltas import ChainFollower, apply_delta_, scale_delta
    from piece_ds.deltas.export_adapter import register_peft_tuner
    from piece_ds.methods.estimate import estimate_mask, select
    from piece_ds.methods.registry import register_estimator
    from piece_ds.models.layout import layout_of
    from piece_ds.selection.estimators import Estimator, Fragment
    from piece_ds.state.mask import Mask
    from piece_ds.training.callback import PieceCallback
    from piece_ds.update.attach import attach, prepare_compact
    from piece_ds.update.sparse_adamw import SparseAdamW
    from piece_ds.update.step_scale import StepScale, general_step_scale, scale_steps
    from piece_ds.zero.sequence_parallel import sequence_loss
    from piece_ds.zero.statistics import collect_statistics


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'piece_ds' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
