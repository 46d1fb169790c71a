"""PieceCallback: PIECE in anybody's transformers Trainer.

    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)
    trainer.add_callback(PieceCallback(trainer, method="piece-s", ratio=0.001))
    trainer.train()

When training begins, DeepSpeed's engine exists and nothing has been trained: that is when importance is estimated on
the trainer's own data and the mask goes in.
"""

import logging
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.config.arguments import UPDATE_MODES, require_choice
from piece_ds.data.collate import MicroBatches
from piece_ds.methods.estimate import count_selected, estimate_mask
from piece_ds.models.layout import layout_of
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.selected_values import selected_values
from piece_ds.update.attach import attach, prepare_compact
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate
from piece_ds.zero.supported import require_trainable

logger = logging.getLogger(__name__)

MASK_NAME = "mask.safetensors"


class PieceCallback(TrainerCallback):
    """Selects weights when training begins, trains only them, and writes OUTPUT_DIR/mask.safetensors.

    A run resumed from a checkpoint uses the mask that it began with, from the same file.

    Attributes:
        mask: after training has begun, the mask in use.
        update: while training, the mask in force.
        select_seconds: wall time of statistics and selection; None where the mask came from a file.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: str = "piece-s",
        ratio: float = 0.001,
        importance_batch_size: int = 4,
        mask_file: str | Path | None = None,
        update_mode: str = "masked",
        save_full: bool = False,
        selected_gradient: str = "auto",
        count: Callable[[nn.Module], int] | None = None,
        estimate: Callable[[Any, MicroBatches, Layout], Mask] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            trainer: whose engine, training data and collator are used.
            method, ratio: as in estimate_mask().
            importance_batch_size: rows in a micro-batch of the statistics pass.
            mask_file: use this mask instead of estimating one.
            update_mode: 'masked', or 'compact': the trainer's model is prepared here and now, and DeepSpeed keeps
                state for the selected weights alone.
            save_full: in compact mode, the trainer's checkpoints hold the whole model. Else they hold what training
                changes; to resume from one, make the trainer with the model that training began with.
            selected_gradient: in compact mode, 'auto' or 'dense'; see GradientCollection.
            count: model -> how many weights the mask will have, for compact mode; None means what method says.
            estimate: called instead of estimate_mask() with (engine, micro-batches, layout).
            options: more arguments of estimate_mask().
        Raises:
            UserError: compact mode with a trainer that has an optimizer already.
        """
        require_choice("update_mode", update_mode, UPDATE_MODES)
        self.trainer = trainer
        self.mask_file = mask_file
        self.mask: Mask | None = None
        self.select_seconds: float | None = None
        self._batch_size = importance_batch_size
        self.update: MaskedUpdate | CompactUpdate | None = None
        self._update_mode, self._save_full = update_mode, save_full
        self._selected_gradient = selected_gradient
        if update_mode == "compact":
            self._prepare(count or partial(count_selected, method, ratio=ratio, seed=options.get("seed", 42)))
        self._estimate = estimate or (
            lambda engine, batches, layout: estimate_mask(engine, batches, method, ratio, layout=layout, **options)
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self.trainer.model_wrapped
        if type(engine).__name__ != "DeepSpeedEngine":
            raise UserError(
                f"PieceCallback expected a DeepSpeed engine, got {type(engine).__name__}: start training "
                "with TrainingArguments(deepspeed=...)"
            )
        require_trainable(engine)  # attach() would refuse it too, after the pass over the data
        if self._update_mode == "compact" and selected_values(engine.module) is None:
            raise UserError("PieceCallback prepares the model for one train(): make another callback for another one")
        layout = layout_of(engine.module)
        path = Path(args.output_dir) / MASK_NAME
        kept = self.is_begun(state)
        if self.mask_file is not None:
            self.mask = load_mask(self.mask_file, layout)
        else:
            self.mask = load_mask(path, layout) if kept else self._select(engine, layout)
        if not kept:
            save_mask(path, self.mask)
        logger.info("%d of %d weights selected (%s)", self.mask.num_selected, layout.total, self.mask.method)
        self.on_mask(engine.module, self.mask, resumed=kept)
        self.update = attach(engine, self.mask, self._save_full, self._selected_gradient)
        self.on_attached(self.update)
        barrier()

    def is_begun(self, state: TrainerState) -> bool:
        """Whether the mask of an interrupted run is used instead of estimating one; the same on all ranks."""
        return state.global_step > 0

    def on_mask(self, model: nn.Module, mask: Mask, resumed: bool) -> None:
        """Called on every rank with the mask, before the first step."""

    def on_attached(self, update: MaskedUpdate | CompactUpdate) -> None:
        """Called on every rank when the mask is in force, before the first step."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.update is not None:
            self.update.detach()
            self.update = None
            self.trainer.__dict__.pop("save_model", None)

    def _prepare(self, count: Callable[[nn.Module], int]) -> None:
        """Before the trainer makes its optimizer and engine: values for as many weights as will be selected."""
        trainer, model = self.trainer, self.trainer.model
        if trainer.optimizer is not None or model is None:
            raise UserError(
                "compact mode makes the trainer's optimizer be one of the selected values: give Trainer a "
                "model and no optimizer, or use update_mode='masked'"
            )
        decays = trainer.get_decay_parameter_names(model)
        given = load_mask(self.mask_file, layout_of(model)) if self.mask_file is not None else None
        prepare_compact(model, num_selected=given.num_selected if given else count(model), decays=decays)
        if not self._save_full:
            trainer.save_model = _outside_checkpoints(trainer.save_model)

    def _select(self, engine: Any, layout: Layout) -> Mask:
        begin = time.perf_counter()
        rows, collate = self.trainer.train_dataset, self.trainer.data_collator
        mask = self._estimate(engine, MicroBatches(rows, collate, self._batch_size), layout)
        self.select_seconds = time.perf_counter() - begin
        return mask


def _outside_checkpoints(save_model: Callable[..., None]) -> Callable[..., None]:
    """save_model(), but nothing for the trainer's own checkpoints: engine.save_checkpoint() writes what they need."""

    @wraps(save_model)
    def save(output_dir: str | None = None, _internal_call: bool = False) -> None:
        in_checkpoint = _internal_call and Path(output_dir or "").name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if not in_checkpoint:
            save_model(output_dir, _internal_call=_internal_call)
        elif is_main():  # the trainer takes a checkpoint for the best one only if its folder is there by now
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    return save
