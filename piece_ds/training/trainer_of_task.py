"""Make the trainer of a task: of its rows or of packs of them, with a mask or a method without one."""

import logging
from typing import Any

from torch import nn
from transformers import TrainingArguments

from piece_ds.data.packs import PackCollator, pack_rows, packs_per_step
from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.models.processor import Processing
from piece_ds.training.trainer import BaselineTrainer, TaskTrainer

logger = logging.getLogger(__name__)


def make_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    tokenizer: Processing,
    baseline: Baseline | None,
    context: TaskContext,
) -> TaskTrainer:
    """Return the trainer of one task: plain if a mask is trained, else with the baseline's rows and loss.

    Args:
        model: before it has an engine.
        arguments: of the task.
        tokenizer: the model's, or its processor.
        baseline: the method, or None if a mask is trained.
        context: of the task.
    """
    task = context.task
    if baseline is None:
        rows, collate = task.train, context.collate
    else:
        arguments.remove_unused_columns = False  # a baseline's rows may carry more than the model knows
        baseline.begin_task(model, context)
        rows, collate = baseline.rows(context), baseline.collate(context)
    if context.pack_tokens is not None:
        rows, collate = pack_rows(task.name, rows, context.pack_tokens, packs_per_step(arguments)), PackCollator()
        logger.warning("task %s: %s", task.name, rows.summary(context.pack_tokens))
    options: dict[str, Any] = {
        "args": arguments,
        "eval_dataset": task.eval if arguments.eval_strategy != "no" else None,
        "processing_class": tokenizer,
        "train_dataset": rows,
        "data_collator": collate,
    }
    if baseline is None:
        return TaskTrainer(model=model, **options)
    return BaselineTrainer(baseline, context, model=model, **options)
