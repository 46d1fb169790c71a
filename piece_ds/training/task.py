"""Train one task of the stream: a fresh engine and optimizer, statistics, selection, training, and the task's files."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from piece_ds.checkpoint.manifest import write_manifest
from piece_ds.config.settings import Settings
from piece_ds.deltas.delta import DELTA_NAME
from piece_ds.deltas.dense import DenseChange
from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.models.processor import Processing
from piece_ds.runtime.distributed import barrier
from piece_ds.runtime.profiling import host_peak_bytes, peak_bytes, reset_peaks, take_seconds
from piece_ds.runtime.rank_status import report_status
from piece_ds.runtime.signals import exit_if_signalled
from piece_ds.training.callback import MASK_NAME
from piece_ds.training.checkpoints import last_checkpoint, needs_resharding, step_of
from piece_ds.training.claim import Claim
from piece_ds.training.forgetting import ForgettingBudget
from piece_ds.training.general_loss import GeneralLoss
from piece_ds.training.general_statistics import GeneralStatistics
from piece_ds.training.mask_source import MaskSource
from piece_ds.training.metrics import METRICS_NAME, MetricsLog, finite
from piece_ds.training.nonfinite import NONFINITE, OVERFLOW, NonfiniteCallback
from piece_ds.training.saving import save_baseline, save_model
from piece_ds.training.sequences import sequence_training
from piece_ds.training.task_begin import (
    arguments_of,
    attach_mask,
    begin_baseline,
    begin_general,
    check_padding,
    check_parts,
)
from piece_ds.training.task_mask import TaskMask
from piece_ds.training.task_result import TaskCost, TaskResult
from piece_ds.training.trainer import TaskTrainer
from piece_ds.training.trainer_callbacks import BeforeFirstStep, EvaluateLastStep, OnEngine, StopAtStep
from piece_ds.training.trainer_of_task import make_trainer
from piece_ds.training.validation import BestStep, Validation
from piece_ds.zero.whole_state import whole_state

# What a task leaves behind, under checksums once it is all there.
COMPLETE = (MASK_NAME, DELTA_NAME, METRICS_NAME, "model")


def train_task(
    *,
    model: nn.Module,
    tokenizer: Processing,
    settings: Settings,
    method: MaskSource | Baseline,
    context: TaskContext,
    general: GeneralStatistics | None,
    general_loss: GeneralLoss | None,
    budget: ForgettingBudget | None,
    validation: Validation | None,
    claim: Claim,
    resume: bool,
    evaluate_before: Callable[[Any], None] | None,
    evaluate_after: Callable[[Any], None],
    save_model_to: Path | None,
    reporter: TrainerCallback,
) -> TaskResult:
    """Train one task and write its mask, delta, metrics and, if asked, model. A collective.

    Args:
        method: where the task's mask comes from, or a method without a mask.
        context: the task in its stream, and its folder, where the trainer's checkpoints go too.
        general, general_loss: statistics of general text, and what it adds to the loss; None without.
        budget: limits the task's forgetting; None without it.
        validation: what is evaluated while the task trains; None without --eval_strategy.
        claim: on the run's folder. It is made here, once there is an engine and before anything is written.
        resume: start from what an interrupted run of the task has left there.
        evaluate_before, evaluate_after: called with the engine: before statistics of a task that begins; at its end.
        save_model_to: transformers folder for the trained model, or None.
        reporter: in place of the Trainer's own.
    Raises:
        Preempted: a signal asked the run to end; the task can be resumed.
        UserError: what an interrupted run has left is damaged.
    """
    knows_host_peak = reset_peaks()
    use_cache = getattr(model.config, "use_cache", None)
    baseline, is_scaled = method if isinstance(method, Baseline) else None, settings.method.step_scale == "general"
    task, folder = context.task, context.folder

    # Make the trainer and, in compact mode, room for the selected values, before there is an engine.
    arguments = arguments_of(settings, folder, masked=baseline is None)
    checkpoint = last_checkpoint(folder) if resume else None
    trainer = make_trainer(model, arguments, tokenizer, baseline, context)
    trainer.is_resharded = checkpoint is not None and needs_resharding(checkpoint, arguments, masked=baseline is None)
    trainer.general, trainer.best = general_loss, None if validation is None else BestStep(validation)
    trainer.sequences = sequence_training(settings.model.sequence_parallel_size, arguments.per_device_train_batch_size)
    change = None if budget is None or baseline is None else DenseChange(model, baseline.scaled_names(model))  # before
    metrics = MetricsLog(folder / METRICS_NAME, trainer)
    resumes_inside = baseline is None or baseline.resumes_inside
    guard = NonfiniteCallback(trainer, task.name, settings.output.nonfinite, metrics, resumes_inside=resumes_inside)
    acts = baseline.engine_callback(context) if baseline is not None else None
    mask = TaskMask(trainer, method, context, resume, settings.output) if isinstance(method, MaskSource) else None

    def before_first_step(engine: Any) -> None:
        """Prepare the first step. The Trainer has made the engine, and no weight has moved."""
        check_padding(trainer, context, tokenizer)
        if baseline is not None or settings.method.update_mode == "masked":
            check_parts(trainer)
        claim.make()
        metrics.open(step_of(checkpoint) if resume else None)
        if evaluate_before is not None and checkpoint is None:
            _evaluate(evaluate_before, engine, metrics, "evaluation before")
        begin_general(general_loss, engine, metrics, has_moved=checkpoint is not None)
        if validation is not None and checkpoint is None and (known := validation.measure_before(engine)):
            trainer.log(known)

        # 1. Collect statistics and select.
        if mask is not None:
            mask.select()

        # 2. Attach: from here on a step moves only selected weights, or what the baseline lets it.
        if mask is not None:
            attach_mask(trainer, mask, checkpoint)
            _note_selection(mask, metrics)
        else:
            begin_baseline(engine, guard, acts, general if is_scaled else None, has_moved=checkpoint is not None)
        claim.is_begun = True

    # 3. Train. The Trainer calls before_first_step() as soon as there is an engine. The guard comes before what acts on
    # the gradient: see NonfiniteCallback.
    callbacks: list[TrainerCallback] = [reporter, metrics, BeforeFirstStep(trainer, before_first_step), guard]
    callbacks += [OnEngine(trainer, acts)] if acts is not None else []
    for callback in (*callbacks, EvaluateLastStep(validation), StopAtStep()):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    forgetting = _end_training(trainer, mask, baseline, context, budget=budget, change=change)

    # 4. Save and evaluate.
    report_status(f"saving task {task.name}")
    metrics.note("training", seconds=metrics.train_seconds, num_steps=trainer.state.global_step)
    model.config.use_cache = use_cache  # the Trainer turns it off, and would save it so
    save_seconds = _save(trainer, mask, baseline, context=context, tokenizer=tokenizer, folder=save_model_to)
    metrics.note("saving", seconds=save_seconds)
    _evaluate(evaluate_after, trainer.model_wrapped, metrics, "evaluation after")
    write_manifest(folder, [name for name in COMPLETE if (folder / name).exists()])
    result = _result(trainer, mask, _cost(trainer, metrics, mask, save_seconds, knows_host_peak), forgetting)
    release(trainer)
    barrier()
    return result


def _end_training(
    trainer: Trainer,
    mask: TaskMask | None,
    baseline: Baseline | None,
    context: TaskContext,
    *,
    budget: ForgettingBudget | None,
    change: DenseChange | None,
) -> dict[str, Any] | None:
    """Take the method out of force and scale the task into the budget; return what was found. A collective.

    Raises:
        Preempted: a signal ended the training.
    """
    if mask is not None:
        mask.end_training()
    step, last = trainer.state.global_step, trainer.state.max_steps
    exit_if_signalled(f"after step {step} of {last} of task {context.task.name}")
    if mask is not None:
        return None if budget is None else mask.limit_forgetting(budget)

    # Scaled first: what later tasks need of this one is that of the weights they start from.
    assert baseline is not None
    found = None
    if budget is not None and change is not None:
        change.end()
        found = budget.limit(trainer.model_wrapped, change)
    baseline.end_task(trainer.model_wrapped, context)
    return found


def _save(
    trainer: Trainer,
    mask: TaskMask | None,
    baseline: Baseline | None,
    *,
    context: TaskContext,
    tokenizer: Processing,
    folder: Path | None,
) -> float:
    """Write the delta and, if folder is not None, the model; return the seconds that it took. A collective."""
    begin = time.perf_counter()
    if mask is not None:
        mask.save_delta()
    if baseline is not None and baseline.saves_itself:
        state = whole_state(trainer.model_wrapped)
        save_baseline(baseline, trainer.model, state, context=context, tokenizer=tokenizer, folder=folder)
    elif folder is not None:
        save_model(trainer, folder)
    return time.perf_counter() - begin


def _result(
    trainer: TaskTrainer, mask: TaskMask | None, cost: TaskCost, forgetting: dict[str, Any] | None
) -> TaskResult:
    return TaskResult(
        cost=cost,
        index=mask.mask.whole() if mask is not None else None,
        log=[finite(row) for row in trainer.state.log_history],
        forgetting=forgetting,
        validation=None if trainer.best is None else trainer.best.result(trainer.state),
    )


def _cost(
    trainer: Trainer, metrics: MetricsLog, mask: TaskMask | None, save_seconds: float, knows_host_peak: bool
) -> TaskCost:
    trained, general = metrics.tokens_per_second()
    return TaskCost(
        select_seconds=(mask.select_seconds or 0.0) if mask is not None else 0.0,
        train_seconds=metrics.train_seconds,
        num_steps=trainer.state.global_step,
        trained_tokens_per_second=trained,
        general_tokens_per_second=general,
        nonfinite_steps=metrics.count(NONFINITE),
        overflow_steps=metrics.count(OVERFLOW),
        peak_bytes=peak_bytes(),
        host_peak_bytes=host_peak_bytes() if knows_host_peak else None,
        save_seconds=save_seconds,
    )


def _evaluate(function: Callable[[Any], None], engine: Any, metrics: MetricsLog, event: str) -> None:
    report_status(f"the {event} training")
    begin = time.perf_counter()
    function(engine)
    metrics.note(event, seconds=time.perf_counter() - begin)


def _note_selection(mask: TaskMask, metrics: MetricsLog) -> None:
    """Note how long selection took, unless the mask was there already."""
    statistics = take_seconds("statistics")
    if mask.select_seconds is not None:
        metrics.note(
            "selection",
            statistics_seconds=statistics,
            num_selected=mask.mask.num_selected,
            proposed_ratio=mask.mask.proposed_ratio,
            selection_seconds=mask.select_seconds - statistics,
        )


def release(trainer: Trainer) -> None:
    """Free the engine: its hooks, buffers, masters and moments. The model stays, partitioned as it was."""
    trainer.model_wrapped.empty_partition_cache()  # ZeRO-3 may still be gathering for a forward that never comes
    trainer.model_wrapped.destroy()

    # Drop every reference to the engine, or its tensors would stay.
    trainer.deepspeed = None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    for param in trainer.model.parameters():
        param.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
