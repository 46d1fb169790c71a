"""What a task does between the making of its trainer and its first step."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments

from piece_ds.config.settings import Settings
from piece_ds.data.collate import pad_id
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.methods.baseline import EngineCallback, TaskContext
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import reads_images
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.training.checkpoints import restore_resharded
from piece_ds.training.general_loss import GeneralLoss
from piece_ds.training.general_statistics import GeneralStatistics
from piece_ds.training.metrics import MetricsLog
from piece_ds.training.nonfinite import NonfiniteCallback
from piece_ds.training.task_mask import TaskMask
from piece_ds.training.trainer import TaskTrainer
from piece_ds.update.step_scale import general_step_scale, scale_steps
from piece_ds.zero.batch_feed import all_to_device
from piece_ds.zero.even_gradients import even_out_gradients
from piece_ds.zero.file_optimizer import settle_optimizer
from piece_ds.zero.partial_gradients import refuse_foreseen_parts


def arguments_of(settings: Settings, folder: Path, masked: bool) -> TrainingArguments:
    """Return the arguments of one task's trainer."""
    # The collator needs columns that no model takes: a row's image and its text.
    options: dict[str, Any] = {"output_dir": folder, "report_to": "none", "remove_unused_columns": False}
    # The run is pushed when it ends, and not the folder of a task.
    options["push_to_hub"] = False
    # Without a mask the best step is in a checkpoint, which transformers loads. With one see BestStep.
    if settings.evaluation.load_best_model_at_end and not masked:
        options["load_best_model_at_end"] = True
    arguments = settings.training_arguments(**options)
    settle_optimizer(arguments.hf_deepspeed_config.config)  # said before the run began
    return arguments


def attach_mask(trainer: TaskTrainer, mask: TaskMask, checkpoint: Path | None) -> None:
    """Put the mask in force, and restore what a checkpoint holds beside DeepSpeed's part. A collective."""
    trainer.update = mask.attach()
    if checkpoint is not None and trainer.is_resharded:
        restore_resharded(trainer.update, checkpoint)
    if trainer.best is not None:
        trainer.best.mask = mask.mask
        if checkpoint is not None:
            trainer.best.load(checkpoint, trainer.state)


def begin_baseline(
    engine: Any,
    guard: NonfiniteCallback,
    acts: EngineCallback | None,
    general: GeneralStatistics | None,
    has_moved: bool,
) -> None:
    """Put a method without a mask in force. A collective.

    Args:
        engine: of the task.
        guard: watches the engine's steps.
        acts: what the baseline does while training, or None.
        general: statistics that scale its steps, or None.
        has_moved: as in GeneralStatistics.take().
    """
    guard.watch_engine()
    even_out_gradients(engine)  # as the update of a mask does; the model keeps it for later tasks
    if general is not None:
        taken = general.take(engine, layout_of(engine.module), has_moved)
        scale_steps(engine, general_step_scale(taken, general.damping_quantile))

    # Last: hooks installed later run earlier, so the watch sees the gradient that the baseline has changed.
    if acts is not None:
        acts.begin(engine)


def begin_general(general_loss: GeneralLoss | None, engine: Any, metrics: MetricsLog, has_moved: bool) -> None:
    """Take the base model's logits of general text, or read them, and note what they cost. A collective."""
    begin = time.perf_counter()
    kept = None if general_loss is None else general_loss.begin(engine, has_moved)
    if kept is not None:
        metrics.note("base logits", seconds=time.perf_counter() - begin, bytes=kept.num_bytes)


def check_padding(trainer: Trainer, context: TaskContext, tokenizer: Processing) -> None:
    """Raise UserError if rows of a batch are not what each is on its own: see check_rows(). A collective."""
    if reads_images(trainer.model.config):
        return

    # With one row a batch nothing is padded.
    sizes = {trainer.args.per_device_train_batch_size, trainer.args.per_device_eval_batch_size, context.batch_size}
    padding = pad_id(tokenizer_of(tokenizer))
    check_rows(trainer.model_wrapped, answer_tokens(context.task.train), padding, sizes == {1})


def check_parts(trainer: TaskTrainer) -> None:
    """Raise UserError if DeepSpeed would take a part of a gradient for all of it: see refuse_foreseen_parts().

    A collective, for steps whose gradients DeepSpeed reduces: masked mode, and methods without a mask.
    """
    rows = trainer.train_dataset
    first = [rows[index] for index in range(min(trainer.args.per_device_train_batch_size, len(rows)))]

    def loss_of() -> Tensor:
        # Collated here: a collator may draw, and what it draws is put back.
        batch = trainer.for_model(trainer.data_collator(first))
        loss: Tensor = trainer.model_wrapped(**all_to_device(batch, trainer.args.device)).loss
        return loss

    refuse_foreseen_parts(trainer.model_wrapped, loss_of)
