"""Train a stream of tasks, one after another, in one process group.

For each task: statistics on the current model, selection, a fresh optimizer, training, evaluation of all tasks so far,
files. The next task starts from these weights; nothing else is carried over.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import set_seed

from piece_ds.checkpoint.manifest import verify_manifest
from piece_ds.checkpoint.mask_file import mask_names
from piece_ds.config.piece import split_patterns
from piece_ds.data.tasks import Task
from piece_ds.evaluation.chunked_loss import install_chunked_loss
from piece_ds.evaluation.evaluate import EvalResult, evaluate_tasks
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible, load_model
from piece_ds.report.results import RunResults, read_results
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.rank_status import report_status
from piece_ds.runtime.signals import Preempted, signal_handling
from piece_ds.training.changes import with_changes
from piece_ds.training.progress import duration, scores_line, time_left
from piece_ds.training.results import (
    is_judged_before,
    num_finished,
    num_steps_before,
    open_results,
    with_before,
    with_before_of,
    with_divergence,
    with_forgetting,
    with_overlaps,
    with_task,
    with_validation,
    write_results,
)
from piece_ds.training.run import (
    Stream,
    budget_for,
    context_of,
    divergence_of,
    general_for,
    general_loss_for,
    mask_files,
    mask_source_of,
    validation_of,
)
from piece_ds.training.run_folder import LOGITS_FOLDER, RunFolder, clear_half_written, forget_resumption, written_bytes
from piece_ds.training.task import train_task
from piece_ds.zero.finite_weights import refuse_nonfinite

logger = logging.getLogger(__name__)


def run_stream(stream: Stream) -> RunResults:
    """Train every task that is not finished yet; return the results of all tasks. A collective.

    A resumed run continues from what is in the folder. Finished tasks are not done again. An unfinished one resumes
    from its last checkpoint, if there is one. A run that fails before its first step leaves the folder as it was.
    """
    resume = stream.claim.resume

    # What is there already.
    results = open_results(stream.folder.results_file, stream.settings, stream.tasks, stream.scorers, resume)
    first = num_finished(results)
    if resume:
        clear_half_written(stream.folder.root)
        _tidy(stream, first - 1)  # the run may have ended between its results and this
    if first == len(stream.tasks):
        return results

    # What is left.
    seconds: list[float] = []
    with signal_handling(), stream.claim.given_back_unless_begun():
        report_status("loading the model")
        model = _load(stream, first)
        for index in range(first, len(stream.tasks)):
            begin = time.perf_counter()
            can_resume = stream.baseline is None or stream.baseline.resumes_inside
            with _stopped_with_advice(stream, index):
                results = _run_task(stream, model, index, results, resume and index == first and can_resume)
            seconds.append(time.perf_counter() - begin)
            logger.warning(
                "task %d of %d done in %s%s",
                index + 1,
                len(stream.tasks),
                duration(seconds[-1]),
                time_left(seconds, len(stream.tasks) - index - 1),
            )
    stream.reporters.close(model=model, processing_class=stream.tokenizer)
    return results


@contextmanager
def _stopped_with_advice(stream: Stream, index: int) -> Iterator[None]:
    """Add to what a signal has ended how this very run is resumed, if it can be."""
    try:
        yield
    except Preempted as stop:
        settings, saves_itself = stream.settings, stream.baseline is not None and stream.baseline.saves_itself
        if index > 0 and settings.output.save_model == "never" and not saves_itself:
            advice = "with --save_model never it cannot be resumed after its first task: begin again in another folder"
        elif settings.output.overwrite_output_dir:
            advice = "the same command with --resume_from_checkpoint True for --overwrite_output_dir resumes it"
        else:
            advice = "the same command with --resume_from_checkpoint True resumes it"
        raise Preempted(f"{stop}; {advice}") from None


def _load(stream: Stream, first: int) -> nn.Module:
    """Return the model that task `first` starts from, or raise UserError if it was not saved or is damaged."""
    # The model of the task before, unless a baseline makes its own from the base model.
    source, previous = None, None
    if first > 0:
        previous = stream.folder.task(first - 1, stream.tasks[first - 1].name)
    if first > 0 and not (stream.baseline and stream.baseline.saves_itself):
        source = stream.model_folder(first - 1)
        if not (source / "config.json").is_file():
            raise UserError(
                f"{source} is missing: with --save_model never a stream cannot be resumed after task {first}; "
                "begin again in another folder"
            )
        verify_manifest(source.parent, inside=f"{source.name}/")
    # ZeRO-3 partitions while loading only if TrainingArguments with its configuration exists.
    arguments = stream.settings.training_arguments(output_dir=stream.folder.root)
    model = load_model(stream.settings.model, stream.dtype, source)
    refuse_nonfinite(f"the model in {source or stream.settings.model.model_name_or_path}", model)

    # Train only what may be selected, or what the baseline adds.
    settings = stream.settings
    freeze_ineligible(
        model,
        selected=_masked_names(settings.method.mask_file),
        patterns=split_patterns(settings.model.eligible),
        excluded=split_patterns(settings.model.exclude),
    )
    install_chunked_loss(model, settings.model.loss_chunk_tokens)
    if stream.baseline is not None:
        set_seed(stream.seed)  # adapters are drawn, the same on every rank
        model = stream.baseline.adapt(model, len(stream.tasks), previous)
    del arguments
    return model


def _masked_names(mask_file: str | None) -> set[str] | None:
    return None if mask_file is None else mask_names(mask_file)


def _run_task(stream: Stream, model: nn.Module, index: int, results: RunResults, resume: bool) -> RunResults:
    # What is evaluated, and when.
    settings, task = stream.settings, stream.tasks[index]
    folder = stream.folder.task(index, task.name)
    logger.warning("task %d of %d: %s (%d rows)", index + 1, len(stream.tasks), task.name, len(task.train))
    scores: list[EvalResult] = []
    divergence = divergence_of(stream)
    apart: dict[str, float] = {}

    def before(engine: Any) -> None:
        nonlocal results
        if stream.compared_to is None:
            results = with_before(results, _evaluate(stream, engine, stream.tasks, "before"))
        else:
            results = _taken_over(stream, results, stream.compared_to)
        divergence.begin(engine)
        write_results(results, stream.folder.results_file)
        stream.reporters.log_results(results)

    def after(engine: Any) -> None:
        seen = index + 1 + settings.evaluation.forward_transfer
        scores.append(_evaluate(stream, engine, stream.tasks[:seen], folder.name))
        apart.update(divergence.of(engine, [task.name for task in stream.tasks[:seen]]))
        if apart:
            logger.warning("KL(base model || model): %s", ", ".join(f"{name} {kl:.4f}" for name, kl in apart.items()))

    # Train.
    trained = train_task(
        model=model,
        tokenizer=stream.tokenizer,
        settings=settings,
        method=mask_source_of(stream, index) if stream.baseline is None else stream.baseline,
        context=context_of(stream, index),
        general=general_for(stream, index),
        general_loss=general_loss_for(stream, index),
        budget=budget_for(stream, index),
        validation=validation_of(stream, index),
        claim=stream.claim,
        resume=resume,
        evaluate_before=before if index == 0 and not is_judged_before(results) else None,
        evaluate_after=after,
        save_model_to=None if settings.output.save_model == "never" else stream.model_folder(index),
        reporter=stream.reporters.of_task(num_steps_before(results)),
    )

    # Write the results whole, with one more row. Only then remove what an unfinished task would need.
    numel = {info.name: info.numel for info in layout_of(model).parameters}
    cost = {**asdict(trained.cost), **written_bytes(folder)}
    results = with_task(results, task.name, scores[0], cost=cost, index=trained.index, numel=numel, log=trained.log)
    results = with_divergence(results, f"after {task.name}", apart)
    results = with_forgetting(results, task.name, trained.forgetting)
    results = with_validation(results, task, trained.validation)
    results = with_overlaps(results, mask_files(stream, index + 1))
    results = with_changes(results, task.name, folder / "delta.safetensors")
    write_results(results, stream.folder.results_file)
    stream.reporters.log_results(results)
    _tidy(stream, index)
    return results


def _evaluate(stream: Stream, engine: Any, tasks: list[Task], moment: str) -> EvalResult:
    found = evaluate_tasks(
        engine,
        stream.tokenizer,
        tasks,
        scorers=stream.scorers,
        general=stream.general,
        batch_size=stream.eval_batch_size,
        settings=stream.settings,
        device=engine.device,
        folder=stream.folder.predictions(moment),
    )
    shown = scores_line(found.score, found.loss, found.general_loss)
    logger.warning("evaluation, %s: %s (%s)", moment, shown, duration(found.seconds))
    return found


def _taken_over(stream: Stream, results: RunResults, other: RunFolder) -> RunResults:
    """Return results with another run's row before any task, and copy what the base model answered. A collective."""
    answers = other.predictions("before")
    if is_main() and answers.is_dir():
        shutil.copytree(answers, stream.folder.predictions("before"), dirs_exist_ok=True)
    results = with_before_of(results, read_results(other.results_file))
    logger.warning("evaluation, before: that of %s, of the same base model", other.root)
    barrier()
    return results


def _tidy(stream: Stream, index: int) -> None:
    """Remove what a finished task no longer needs to resume, and models that --save_model last drops. A collective."""
    if is_main() and index >= 0:
        forget_resumption(stream.folder.task(index, stream.tasks[index].name))
        for name in stream.baseline.passing if index > 0 and stream.baseline is not None else ():
            shutil.rmtree(stream.folder.task(index - 1, stream.tasks[index - 1].name) / name, ignore_errors=True)
        if stream.settings.output.save_model == "last" and index > 0:
            shutil.rmtree(stream.model_folder(index - 1), ignore_errors=True)
        if index == len(stream.tasks) - 1:  # no later task is held to the base model
            shutil.rmtree(stream.folder.root / LOGITS_FOLDER, ignore_errors=True)
    barrier()
