"""What every launch script reads before a weight is read: configuration, tokenizer, tasks; every refusal on the way."""

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from piece_ds.config.defaults import timeout_seconds, with_precision
from piece_ds.config.parsing import Settings
from piece_ds.data.image_collate import check_processor
from piece_ds.data.tasks import Task, load_general, load_task_stream
from piece_ds.evaluation.benchmarks import check_ability
from piece_ds.evaluation.scorers import choose_scorers, parse_scorers
from piece_ds.models.loading import check_eligible, dtype_of, load_config, load_tokenizer, require_weights
from piece_ds.models.processor import Processing
from piece_ds.preflight.checks import check_deepspeed_file, check_mask, check_method_reads_images
from piece_ds.runtime.process import start_distributed


@dataclass(frozen=True)
class Inputs:
    """Everything but the weights.

    Attributes:
        settings: with the precision of the model's files among its flags.
        config: the model's.
        tokenizer: the model's, or the processor of one that reads images.
        dtype: to load and train the model in.
        tasks: tokenized, in order.
        scorers: task -> name of its scorer.
        general: tokenized text that no task trains, or None.
        general_importance: tokenized text that piece-ratio takes statistics of, or None.
        arguments: made from settings; while it lives, transformers loads models partitioned under ZeRO-3.
    """

    settings: Settings
    config: Any
    tokenizer: Processing
    dtype: torch.dtype
    tasks: list[Task]
    scorers: dict[str, str]
    general: datasets.Dataset | None
    general_importance: datasets.Dataset | None
    arguments: TrainingArguments


def load_inputs(settings: Settings) -> Inputs:
    """Read and check them, cheapest first, then start torch.distributed.

    Raises:
        UserError: a file, folder or setting that cannot be used; nothing has been written.
    """
    check_deepspeed_file(settings.flag("deepspeed"))
    config = load_config(settings.model)
    require_weights(settings.model)
    check_mask(settings, config)
    check_method_reads_images(settings.method.method, config)
    check_eligible(settings.model, config)
    tokenizer = load_tokenizer(settings.model, config)
    check_processor(tokenizer)
    data = settings.data
    parse_scorers(settings.evaluation.scorers)
    check_ability(settings.evaluation)
    tasks = load_task_stream(data, tokenizer)
    about_images = [task.name for task in tasks if task.has_images]
    scorers = choose_scorers([(task.name, task.answers) for task in tasks], settings.evaluation.scorers, about_images)
    general = None
    if data.general_file:
        general = load_general(data.general_file, tokenizer, data.cutoff, False, data.max_eval_samples, data)
    general_importance = None
    if data.general_importance_file:
        general_importance = load_general(data.general_importance_file, tokenizer, data.cutoff, images=data)
    start_distributed(timeout_seconds(settings.flag("ddp_timeout")))
    settings, dtype = with_precision(settings, dtype_of(settings.model, config))
    return Inputs(
        settings, config, tokenizer, dtype, tasks, scorers, general, general_importance, settings.training_arguments()
    )
