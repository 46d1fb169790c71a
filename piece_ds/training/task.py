"""One task of the stream: a fresh engine and optimizer, statistics, selection, training, and the task's files."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.checkpoint.manifest import write_manifest
from piece_ds.checkpoint.statistics_file import PartialStatistics
from piece_ds.config.parsing import Settings
from piece_ds.data.collate import pad_id
from piece_ds.data.tasks import Task
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.models.loading import reads_images
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.runtime.distributed import barrier, broadcast_object
from piece_ds.runtime.profiling import host_peak_bytes, peak_bytes, reset_peaks, take_seconds
from piece_ds.runtime.rank_status import report_status
from piece_ds.runtime.signals import exit_if_signalled
from piece_ds.state.mask import Mask
from piece_ds.training.callback import MASK_NAME, PieceCallback
from piece_ds.training.mask_source import MaskSource
from piece_ds.training.metrics import MetricsLog, finite
from piece_ds.training.nonfinite import NONFINITE, OVERFLOW, NonfiniteCallback
from piece_ds.training.run_folder import PARTIAL_NAME, PREVIOUS_NAME
from piece_ds.training.saving import save_baseline, save_model
from piece_ds.training.trainer import (
    OnEngine,
    StopAtStep,
    TaskTrainer,
    Update,
    last_checkpoint,
    make_trainer,
    needs_resharding,
    restore_resharded,
    step_of,
)
from piece_ds.zero.weights import read_selected

DELTA_NAME = "delta.safetensors"
METRICS_NAME = "metrics.jsonl"

# What a task leaves behind, under checksums once it is all there.
SEALED = (MASK_NAME, DELTA_NAME, METRICS_NAME, "model")


@dataclass(frozen=True)
class TaskResult:
    """What a trained task leaves in memory.

    Attributes:
        cost: wall time and memory.
        index: selected positions of the whole model per parameter; None without a mask.
        log: the trainer's log.
    """

    cost: "TaskCost"
    index: dict[str, Tensor] | None
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskCost:
    """Wall time and memory of one task on rank 0.

    Attributes:
        select_seconds: statistics and selection; 0 where there was nothing to select.
        train_seconds: optimizer steps.
        num_steps: optimizer steps.
        nonfinite_steps: of these, not taken because a loss or gradient was NaN or infinite.
        overflow_steps: of these, not taken because fp16's loss scale was too large.
        peak_bytes: most memory allocated on the accelerator; None on the CPU.
        host_peak_bytes: most resident memory of the process; None where the system does not tell.
        save_seconds: delta and model.
    """

    select_seconds: float
    train_seconds: float
    num_steps: int
    nonfinite_steps: int
    overflow_steps: int
    peak_bytes: int | None
    host_peak_bytes: int | None
    save_seconds: float


class TaskCallback(PieceCallback):
    """PieceCallback that also keeps what the selected weights were before the task, across interruptions.

    Attributes:
        checkpoint: to go on from, in its portable form.
        resume: the task's folder may hold the mask of an interrupted run.
    """

    previous: dict[str, Tensor]
    checkpoint: Path | None = None
    resume = False

    def is_begun(self, state: TrainerState) -> bool:
        # previous.safetensors is written after the mask: with it, selection is done.
        done = self.resume and self.mask_file is None and broadcast_object(self._previous.is_file())
        return super().is_begun(state) or bool(done)

    def on_mask(self, model: nn.Module, mask: Mask, resumed: bool) -> None:
        if resumed:
            self.previous = load_previous(self._previous, mask)
        else:
            self.previous = read_selected(model, mask)
            save_delta(self._previous, model, mask, self.previous)

    def on_attached(self, update: Update) -> None:
        if self.checkpoint is not None:
            restore_resharded(update, self.checkpoint)
        self.trainer.update = update

    @property
    def _previous(self) -> Path:
        return Path(self.trainer.args.output_dir) / PREVIOUS_NAME


def train_task(
    model: nn.Module,
    tokenizer: Processing,
    task: Task,
    settings: Settings,
    folder: Path,
    method: MaskSource | Baseline,
    context: TaskContext,
    resume: bool,
    before_training: Callable[[Any], None] | None,
    after_training: Callable[[Any], None],
    save_model_to: Path | None,
    reporter: TrainerCallback,
) -> TaskResult:
    """Train one task and write its mask, delta, metrics and, if asked, model.

    Args:
        folder: of the task; the trainer's checkpoints go there too.
        method: where the task's mask comes from, or a method without a mask.
        context: the task in its stream.
        resume: go on from what an interrupted run of the task has left there.
        before_training: called with the engine before anything is estimated (not after a resume from a checkpoint).
        after_training: called with the engine after the last step.
        save_model_to: transformers folder for the trained model, or None.
        reporter: takes the place of the Trainer's own reporters.
    Raises:
        Preempted: a signal asked the run to end; the task can be resumed.
        UserError: what an interrupted run has left is damaged.
    """
    knows_host_peak = reset_peaks()
    # The collator needs columns that no model takes: a row's image and its text.
    arguments = settings.training_arguments(output_dir=folder, report_to="none", remove_unused_columns=False)
    checkpoint = last_checkpoint(folder) if resume else None
    portable = checkpoint is not None and needs_resharding(checkpoint, arguments, not isinstance(method, Baseline))
    use_cache = getattr(model.config, "use_cache", None)
    trainer = make_trainer(model, arguments, task, tokenizer, method, context)
    trainer.portable = portable
    trainer.add_callback(reporter)
    metrics = MetricsLog(folder / METRICS_NAME, trainer)
    metrics.open(step_of(checkpoint) if resume else None)
    trainer.add_callback(metrics)
    if not reads_images(model.config):
        trainer.add_callback(_OnBegin(lambda: _check_rows(trainer, task, tokenizer, settings)))
    if before_training is not None and checkpoint is None:
        trainer.add_callback(_OnBegin(lambda: _evaluate(before_training, trainer, metrics, "evaluation before")))
    guard = NonfiniteCallback(trainer, task.name, settings.output.nonfinite, metrics)
    trainer.add_callback(guard)
    callback = None
    if isinstance(method, Baseline):
        trainer.add_callback(_OnBegin(guard.watch_engine))
        acts = method.engine_callback(context)
        if acts is not None:
            trainer.add_callback(OnEngine(trainer, acts))
    else:
        callback = _mask_callback(trainer, settings, method, task, folder)
        callback.resume, callback.checkpoint = resume, checkpoint if portable else None
        trainer.add_callback(callback)
        trainer.add_callback(_OnBegin(lambda: _note_selection(callback, metrics)))
    trainer.add_callback(StopAtStep())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    exit_if_signalled(f"after step {trainer.state.global_step} of {trainer.state.max_steps} of task {task.name}")
    engine = trainer.model_wrapped
    if isinstance(method, Baseline):
        method.end_task(engine, context)
    report_status(f"saving task {task.name}")
    metrics.note("training", seconds=metrics.train_seconds, num_steps=trainer.state.global_step)
    index, saving_since = None, time.perf_counter()
    if callback is not None and callback.mask is not None:
        save_delta(folder / DELTA_NAME, engine.module, callback.mask, callback.previous)
        index = callback.mask.whole()
    if isinstance(method, Baseline) and method.saves_itself:
        model.config.use_cache = use_cache
        state = trainer.accelerator.get_state_dict(engine)
        save_baseline(method, model, state, context, tokenizer, save_model_to)
    elif save_model_to is not None:
        model.config.use_cache = use_cache  # the Trainer turns it off, and would save it so
        save_model(trainer, save_model_to)
    save_seconds = time.perf_counter() - saving_since
    metrics.note("saving", seconds=save_seconds)
    _evaluate(after_training, trainer, metrics, "evaluation after")
    write_manifest(folder, [name for name in SEALED if (folder / name).exists()])
    cost = TaskCost(
        select_seconds=(callback.select_seconds or 0.0) if callback else 0.0,
        train_seconds=metrics.train_seconds,
        num_steps=trainer.state.global_step,
        nonfinite_steps=metrics.count(NONFINITE),
        overflow_steps=metrics.count(OVERFLOW),
        peak_bytes=peak_bytes(),
        host_peak_bytes=host_peak_bytes() if knows_host_peak else None,
        save_seconds=save_seconds,
    )
    log = [finite(row) for row in trainer.state.log_history]
    release(trainer)
    barrier()
    return TaskResult(cost, index, log)


def _check_rows(trainer: TaskTrainer, task: Task, tokenizer: Processing, settings: Settings) -> None:
    sizes = {trainer.args.per_device_train_batch_size, trainer.args.per_device_eval_batch_size}
    one_row_at_a_time = sizes | {settings.method.importance_batch_size} == {1}
    padding = pad_id(tokenizer_of(tokenizer))
    check_rows(trainer.model_wrapped, answer_tokens(task.train), padding, one_row_at_a_time)


def _mask_callback(
    trainer: TaskTrainer, settings: Settings, method: MaskSource, task: Task, folder: Path
) -> TaskCallback:
    asked = settings.method
    return TaskCallback(
        trainer,
        ratio=asked.mask_ratio,
        importance_batch_size=asked.importance_batch_size,
        mask_file=asked.mask_file,
        update_mode=asked.update_mode,
        save_full=settings.output.save_full,
        selected_gradient=asked.selected_gradient,
        count=method.count,
        estimate=partial(method.estimate, keeper=_keeper(settings, task, folder)),
    )


def _keeper(settings: Settings, task: Task, folder: Path) -> PartialStatistics:
    source = {"task": task.name, "rows": len(task.train), "batch_size": settings.method.importance_batch_size}
    return PartialStatistics(folder / PARTIAL_NAME, settings.method.statistics_save_steps, source)


class _OnBegin(TrainerCallback):
    """Calls a function when training begins: the engine exists, no weight has moved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.function()


def _evaluate(function: Callable[[Any], None], trainer: Trainer, metrics: MetricsLog, event: str) -> None:
    report_status(f"the {event} training")
    begin = time.perf_counter()
    function(trainer.model_wrapped)
    metrics.note(event, seconds=time.perf_counter() - begin)


def _note_selection(callback: TaskCallback, metrics: MetricsLog) -> None:
    """What it took, unless the mask was there already."""
    statistics = take_seconds("statistics")
    if callback.select_seconds is not None and callback.mask is not None:
        metrics.note(
            "selection",
            statistics_seconds=statistics,
            num_selected=callback.mask.num_selected,
            selection_seconds=callback.select_seconds - statistics,
        )


def release(trainer: Trainer) -> None:
    """Free the engine: its hooks, buffers, masters and moments. The model stays, partitioned as it was."""
    trainer.model_wrapped.empty_partition_cache()  # ZeRO-3 may still be gathering for a forward that never comes
    trainer.model_wrapped.destroy()
    trainer.deepspeed = None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    for param in trainer.model.parameters():
        param.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
