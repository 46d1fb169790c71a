"""Prepare a transformers Trainer for compact mode: its model, and checkpoints without a second copy of it."""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.overriding import override
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values
from piece_ds.update.attach import prepare_compact
from piece_ds.zero.sequence_parallel import sequence_size
from piece_ds.zero.supported import require_trainable

logger = logging.getLogger(__name__)


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
        A function that takes what was changed off the trainer: it writes whole checkpoints again.
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

    # The values' group has the decay, and `decays` says which of them it acts on. A trainer that chooses by names would
    # give them none.
    changed = [override(trainer, "get_decay_parameter_names", lambda model: [*decays, PARAMETER_NAME])]
    _say_own_optimizer(trainer)
    # Without the optimizer's part a checkpoint is the model that save_model() writes, and nothing else.
    if not save_full and not trainer.args.save_only_model:
        changed.append(override(trainer, "save_model", _outside_checkpoints(trainer.save_model)))

    def undo() -> None:
        for restore in changed:
            restore()

    return undo


def _say_own_optimizer(trainer: Trainer) -> None:
    """Warn of a trainer that makes its own groups of parameters: it will find one parameter for all selected values."""
    method = getattr(type(trainer), "create_optimizer", None)
    if method is not None and method.__module__.partition(".")[0] not in ("transformers", "trl", "piece_ds"):
        logger.warning(
            "%s makes its optimizer itself: in compact mode it finds one parameter of all selected values, %r, so "
            "rates or decays that it gives by a weight's name or layer have no effect; update_mode='masked' keeps them",
            type(trainer).__name__,
            PARAMETER_NAME,
        )


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
