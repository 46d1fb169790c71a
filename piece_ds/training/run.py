"""Define a run, and what each of its tasks is given: mask, statistics, general text, context."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from piece_ds.config.settings import Settings
from piece_ds.data.image_collate import ImageCollator, make_collator
from piece_ds.data.packing import training_collator
from piece_ds.data.tasks import Task
from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.methods.registry import find_method
from piece_ds.models.processor import Processing
from piece_ds.report.results import GENERAL_TEXT
from piece_ds.training.base_divergence import BaseDivergence
from piece_ds.training.best_step import LOSS_WITHIN_BUDGET
from piece_ds.training.claim import Claim
from piece_ds.training.forgetting import ForgettingBudget, searched_half
from piece_ds.training.general_loss import GeneralLoss, general_loss_of
from piece_ds.training.general_statistics import GeneralStatistics, general_statistics_of
from piece_ds.training.mask_source import MaskSource
from piece_ds.training.reporters import StreamReporters
from piece_ds.training.run_folder import RunFolder
from piece_ds.training.validation import Validation, rule_of


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A run: what to do, on which data, where to.

    Attributes:
        settings: checked.
        tokenizer: the model's, or its processor.
        tasks: in order.
        scorers: task -> name of its scorer.
        general: text whose loss is evaluated, or None.
        dtype: to load and train the model in.
        claim: on the run's folder.
        eval_batch_size: rows of a batch in evaluation, on each rank.
        seed: of everything that is drawn.
        reporters: of the whole stream.
        baseline: the method, if it is one without a mask.
        general_importance: text that stands for general ability in training, or None.
        judged: text that --forgetting_budget judges on, which nothing else uses; None without it.
        compared_to: finished run of the same base model, tasks and evaluation, whose row before any task is this run's
            too; None means to judge the base model.
    """

    settings: Settings
    tokenizer: Processing
    tasks: list[Task]
    scorers: dict[str, str]
    general: datasets.Dataset | None
    dtype: torch.dtype
    claim: Claim
    eval_batch_size: int
    seed: int
    reporters: StreamReporters
    baseline: Baseline | None = None
    general_importance: datasets.Dataset | None = None
    judged: datasets.Dataset | None = None
    compared_to: RunFolder | None = None

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return self.claim.folder

    def model_folder(self, index: int) -> Path:
        """Return the folder of a task's model."""
        return self.folder.model(index, self.tasks[index].name)


def mask_source_of(stream: Stream, index: int) -> MaskSource:
    """Return where the mask of a task comes from."""
    settings = stream.settings
    config = settings.method.config(stream.seed, settings.model.exclude, settings.output.save_full)

    # Only methods that avoid earlier masks get them.
    return MaskSource(
        config=config,
        files=settings.method,
        task=stream.tasks[index].name,
        earlier=mask_files(stream, index) if find_method(config.method).needs_earlier_tasks else (),
        general=general_for(stream, index),
        is_first=index == 0,
    )


def budget_for(stream: Stream, index: int) -> ForgettingBudget | None:
    """Return what limits a task's forgetting, or None without --forgetting_budget."""
    nats, task = stream.settings.method.forgetting_budget, stream.tasks[index]
    if nats is None:
        return None
    assert stream.judged is not None

    # Rows that the task is judged on must not choose its scale.
    validated = task.eval if task.validation is not None else None
    return ForgettingBudget(
        nats=nats,
        tokenizer=stream.tokenizer,
        judged=stream.judged,
        validated=validated,
        batch_size=stream.eval_batch_size,
    )


def general_for(stream: Stream, index: int) -> GeneralStatistics | None:
    """Return the statistics of general text for a task, or None without general text."""
    collate, folder = make_collator(stream.tokenizer), stream.folder.root / "general_statistics"
    return general_statistics_of(stream.settings.method, stream.general_importance, collate, folder, index == 0)


def general_loss_for(stream: Stream, index: int) -> GeneralLoss | None:
    """Return what general text adds to a task's loss, or None."""
    return general_loss_of(
        stream.settings.method,
        stream.general_importance,
        make_collator(stream.tokenizer),
        seed=stream.seed + index,
        folder=stream.folder.root,
        is_base=index == 0,
    )


def divergence_of(stream: Stream) -> BaseDivergence:
    """Return what tells how far the stream has moved the model."""
    settings, collate = stream.settings, make_collator(stream.tokenizer)
    rows: dict[str, Any] = {task.name: task.test for task in stream.tasks}

    # Logits of rows with images are not kept, and those of a chunked loss are never held whole.
    is_off = isinstance(collate, ImageCollator) or settings.model.loss_chunk_tokens > 0
    return BaseDivergence(
        rows=rows if stream.general is None else {GENERAL_TEXT: stream.general} | rows,
        collate=collate,
        batch_size=stream.eval_batch_size,
        num_tokens=0 if is_off else settings.evaluation.kl_tokens,
        folder=stream.folder.root,
    )


def context_of(stream: Stream, index: int) -> TaskContext:
    """Return a task as a baseline sees it."""
    folders = [stream.folder.task(i, task.name) for i, task in enumerate(stream.tasks)]
    return TaskContext(
        index=index,
        num_tasks=len(stream.tasks),
        task=stream.tasks[index],
        earlier=tuple(stream.tasks[:index]),
        folder=folders[index],
        previous=folders[index - 1] if index else None,
        collate=training_collator(stream.tokenizer, stream.settings.data.packing),
        batch_size=stream.settings.method.importance_batch_size,
        seed=stream.seed,
        pack_tokens=stream.settings.data.pack_tokens,
    )


def validation_of(stream: Stream, index: int) -> Validation | None:
    """Return what is evaluated while a task trains; None without --eval_strategy."""
    settings, task = stream.settings, stream.tasks[index]
    arguments = settings.training_arguments(output_dir=stream.folder.root)
    if arguments.eval_strategy == "no":
        return None
    rule = rule_of(settings, arguments)
    general = stream.judged if rule is not None and rule.metric == LOSS_WITHIN_BUDGET else None
    return Validation(
        task=task.on_validation(),
        tokenizer=stream.tokenizer,
        settings=settings,
        scorer=stream.scorers[task.name],
        batch_size=stream.eval_batch_size,
        rule=rule,
        general=None if general is None else searched_half(general),
        loads_best=settings.evaluation.load_best_model_at_end,
    )


def mask_files(stream: Stream, num_tasks: int) -> list[Path]:
    """Return the mask files of the first num_tasks tasks that are there."""
    paths = [stream.folder.task(i, task.name) / "mask.safetensors" for i, task in enumerate(stream.tasks[:num_tasks])]
    return [path for path in paths if path.is_file()]
