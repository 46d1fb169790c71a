"""Refuse a trainer that PieceCallback cannot serve when it is made, and say what DeepSpeed will do to its model."""

import logging

import torch
from torch import nn
from transformers import Trainer

from piece_ds.methods.registry import find_method
from piece_ds.models.adapters import refuse_adapters
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)


def check_trainer(trainer: Trainer) -> None:
    """Raise UserError for a trainer that no mask can be attached to; warn of weights that will be rounded.

    Without this, one without DeepSpeed would end after the data has been prepared, one with an adapter inside
    DeepSpeed, and one that begins anew would have weights changed outside its second mask.
    """
    if not getattr(trainer, "is_deepspeed_enabled", True):
        raise UserError(
            "PieceCallback expected a trainer with DeepSpeed, got one without: make its arguments with "
            'deepspeed="ds_configs/zero2.json" or another DeepSpeed file or dict, or start the script by accelerate '
            "launch with a DeepSpeed configuration"
        )
    if getattr(trainer.args, "auto_find_batch_size", False):
        raise UserError(
            "PieceCallback serves one training, and auto_find_batch_size begins another one in a new engine when "
            "memory runs out, with weights that the first has changed: choose per_device_train_batch_size (piece_ds "
            "plan says what fits)"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise UserError(
            "PieceCallback prepares the trainer's model when it is made, and a trainer with model_init makes another "
            "one when training begins: give Trainer the model itself (model=...)"
        )
    model = trainer.model
    if model is None:
        return
    refuse_adapters(model, "PieceCallback", ", or make the trainer without peft_config")
    _say_rounding(trainer, model)


def check_importance(trainer: Trainer, method: str) -> None:
    """Raise UserError for a trainer of TRL whose loss cannot be taken of its rows before training.

    Without this, the pass over the data would give the trainer's prompts to its model, and end in its error.
    """
    estimator = find_method(method).estimator
    if estimator is not None and not estimator.needs_statistics:
        return
    # What only a step of its own knows: batches that it makes while it trains, or the loss.
    own = [name for name in ("_prepare_inputs", "_inner_training_loop", "training_step") if _is_trls(trainer, name)]
    if hasattr(trainer, "_generate_and_score_completions"):  # which makes a batch of any rows
        own = [name for name in own if name != "_prepare_inputs"]
    if "training_step" in own and not has_plain_loss(trainer):
        own = [name for name in own if name != "training_step"]
    if own:
        raise UserError(
            f"PieceCallback takes importance of the trainer's loss on its rows before training, and "
            f"{type(trainer).__name__} makes its batches or its loss only while it trains ({own[0]}): give "
            "mask_file=, a mask that piece_ds select or another trainer has made, or method='magnitude' or 'random'"
        )


def has_plain_loss(trainer: Trainer) -> bool:
    """Return whether compute_loss is transformers' own: no subclass has another, nor has somebody set one on it."""
    return getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss


def _is_trls(trainer: Trainer, name: str) -> bool:
    method = getattr(type(trainer), name, None)
    return getattr(method, "__module__", "").partition(".")[0] == "trl"


def check_compact(trainer: Trainer) -> None:
    """Raise UserError for a trainer that cannot have the one parameter more that compact mode gives its model.

    Without this, TRL's synchronised reference would end at its first synchronisation, in the midst of training.
    """
    if getattr(trainer.args, "sync_ref_model", False):
        raise UserError(
            "sync_ref_model pairs the parameters of the model with its reference's, and in compact mode the model has "
            "one more: use update_mode='masked', or no sync_ref_model"
        )


def _say_rounding(trainer: Trainer, model: nn.Module) -> None:
    """Say that DeepSpeed casts fp32 weights to the dtype of training, so that all of them change once."""
    wanted = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else None
    found = [param for param in model.parameters() if param.dtype == torch.float32]
    if wanted is None or not found or not is_main():
        return
    logger.warning(
        "%d parameters of the model are float32 and training is in %s: DeepSpeed rounds them all before the first "
        "step. What keeps its bits from then on is the rounded model, and its delta goes on a %s folder only; load the "
        "model with dtype=torch.%s to begin there",
        *(len(found), wanted, wanted, wanted),
    )
