"""Prepare a transformers Trainer for compact mode: its model, and checkpoints without a second copy of it."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.selected_values import selected_values
from piece_ds.update.attach import prepare_compact
from piece_ds.zero.sequence_parallel import sequence_size
from piece_ds.zero.supported import require_trainable


def engine_of(trainer: Trainer) -> Any:
    """Return the trainer's DeepSpeed engine, once training has begun.

    Raises:
        UserError: there is none, or it uses what masks are not proven with. Refused here, before the pass over the
            data.
    """
    engine = trainer.model_wrapped
    if type(engine).__name__ != "DeepSpeedEngine":
        raise UserError(
            f"PieceCallback expected a DeepSpeed engine, got {type(engine).__name__}: start training "
            "with TrainingArguments(deepspeed=...)"
        )
    require_trainable(engine)
    is_own = getattr(trainer, "sequences", None) is not None  # its loss is right at every stage
    if sequence_size(engine) > 1 and not is_own and engine.zero_optimization_stage() != 3:
        raise UserError(
            "sequence parallelism (parallelism_config) below ZeRO-3: the trainer's loss gives gradients as many times "
            "too large as ranks share a row; use ZeRO-3, or a loop of your own with piece_ds.sequence_loss()"
        )
    return engine


def prepare_trainer(
    trainer: Trainer, count: Callable[[nn.Module], int], save_full: bool, unit: str = "element"
) -> Callable[[], None]:
    """Give the trainer's model room for the selected values, before its optimizer and engine are made.

    Args:
        trainer: before training, without an optimizer.
        count: model -> number of weights in the mask that will be attached.
        save_full: the trainer's checkpoints hold the whole model, not only what training changes.
        unit: what the mask selects, as in estimate_mask().
    Returns:
        A function that lets the trainer write whole checkpoints again, for after training.
    Raises:
        UserError: the trainer has an optimizer already.
    """
    # An optimizer that exists already would hold the model's own parameters.
    model = trainer.model
    if model is not None and selected_values(model) is not None:
        raise UserError("the trainer's model is prepared by another PieceCallback already: give a trainer one")
    if trainer.optimizer is not None or model is None:
        raise UserError(
            "compact mode makes the trainer's optimizer be one of the selected values: give Trainer a "
            "model and no optimizer, or use update_mode='masked'; of one that has trained, make another Trainer"
        )
    decays = trainer.get_decay_parameter_names(model)
    prepare_compact(model, num_selected=count(model), decays=decays, unit=unit)
    if not save_full:
        trainer.save_model = _outside_checkpoints(trainer.save_model)
    return lambda: trainer.__dict__.pop("save_model", None)


def _outside_checkpoints(save_model: Callable[..., None]) -> Callable[..., None]:
    """Return a save_model() that leaves checkpoints alone: engine.save_checkpoint() writes what they need."""

    @wraps(save_model)
    def save(output_dir: str | None = None, _internal_call: bool = False) -> None:
        in_checkpoint = _internal_call and Path(output_dir or "").name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if not in_checkpoint:
            save_model(output_dir, _internal_call=_internal_call)
        elif is_main():  # the trainer takes a checkpoint for the best one only if its folder is there by now
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    return save
