"""Read what every launch script needs before the weights: configuration, tokenizer, tasks.

Refuse what cannot be used.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from piece_ds.config.defaults import timeout_seconds
from piece_ds.config.recommended import MEASURED_SIZE, rate_in_proportion
from piece_ds.config.settings import Settings
from piece_ds.data.general_rows import load_general
from piece_ds.data.image_collate import check_processor
from piece_ds.data.packing import check_packing
from piece_ds.data.tasks import Task, holds_token_ids, load_task_stream
from piece_ds.evaluation.benchmarks import check_ability
from piece_ds.evaluation.scorers import choose_scorers, parse_scorers
from piece_ds.methods.baseline import Baseline
from piece_ds.models.loading import (
    bring_weights,
    check_attention_of,
    check_eligible,
    dtype_of,
    load_config,
    load_tokenizer,
    reads_images,
    require_weights,
)
from piece_ds.models.model_settings import check_generation_settings
from piece_ds.models.pretrained import model_source
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.models.suitable import check_checkpoint
from piece_ds.models.token_ids import token_ids_tokenizer
from piece_ds.models.weight_size import size_of_files, vocabulary_of
from piece_ds.preflight.checks import (
    check_deepspeed_file,
    check_mask,
    check_method_reads_images,
    warn_of_stacked_experts,
)
from piece_ds.preflight.general_text import (
    check_base_logits,
    check_general_text,
    judged_apart,
    read_general_text,
    write_general_text,
)
from piece_ds.preflight.rows_fit import check_prompts_fit, check_rows_fit
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import start_distributed
from piece_ds.runtime.processor import bf16_is_slow
from piece_ds.training.claim import Claim
from piece_ds.training.reporters import StreamReporters

logger = logging.getLogger(__name__)


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
        general_importance: tokenized rows of --general_text, which stand for general ability, or None.
        judged: rows that --forgetting_budget judges on: of --general_file, or held out from --general_text; else None.
        arguments: made from settings. While this object lives, transformers loads models partitioned under ZeRO-3.
        baseline: the method, if it is one without a mask.
        claim: of training, on the run's folder; checked, not made.
        reporters: of training.
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
    judged: datasets.Dataset | None = None
    baseline: Baseline | None = None
    claim: Claim | None = None
    reporters: StreamReporters | None = None

    @property
    def output_file(self) -> Path:
        """The one file that selection and evaluation write. preflight() has checked that it is given."""
        assert self.settings.output.output_file is not None
        return Path(self.settings.output.output_file)


def load_inputs(settings: Settings) -> Inputs:
    """Read and check all inputs, cheapest first, then start torch.distributed.

    Raises:
        UserError: a file, folder or setting cannot be used. Nothing has been written.
    """
    # What flags and the model's configuration tell.
    check_deepspeed_file(settings.flag("deepspeed"))
    config = load_config(settings.model)
    bring_weights(settings.model)
    require_weights(settings.model)
    check_checkpoint(settings.model, config)
    check_generation_settings(settings.model)
    check_attention_of(settings.model, config)
    check_mask(settings, config)
    check_method_reads_images(settings.method.method, config)
    warn_of_stacked_experts(settings.method.method, settings.method.unit, config, settings.model.trust_remote_code)
    check_eligible(settings.model, config)
    check_general_text(settings, config)
    settings = with_rate(settings, config)
    data = settings.data
    if data.packing:
        check_packing(config, settings.model.attn_implementation)

    # The tokenizer, and flags that need no rows.
    tokenizer = _tokenizer(settings, config)
    check_processor(tokenizer)
    parse_scorers(settings.evaluation.scorers)
    check_ability(settings.evaluation)

    # The tasks and their scorers.
    tasks = load_task_stream(data, tokenizer, _seed(settings))
    about_images = [task.name for task in tasks if task.has_images]
    scorers = choose_scorers([(task.name, task.answers) for task in tasks], settings.evaluation.scorers, about_images)
    plain = {task.name: "loss" for task in tasks if not task.generates}
    scorers |= {
        name: scorer for name, scorer in plain.items() if name not in parse_scorers(settings.evaluation.scorers)
    }

    # General text, and whether all rows fit the model.
    general = None
    if data.general_file:
        general = load_general(data.general_file, tokenizer, data.cutoff, max_rows=data.max_eval_samples, images=data)
    general_text = read_general_text(settings, tokenizer)
    others = {"--general_file": general, "--general_text": general_text}
    check_rows_fit(config, tasks, others, tokenizer_of(tokenizer).pad_token_id)
    check_prompts_fit(config, tasks, scorers, (data.max_new_tokens, settings.evaluation.max_new_tokens_text))

    # From here on, ranks talk to each other.
    start_distributed(timeout_seconds(settings.flag("ddp_timeout")))
    settings, dtype = with_precision(settings, dtype_of(settings.model, config))
    if general_text is None:
        general_text = write_general_text(settings, tokenizer, dtype)
    general_text, judged = judged_apart(settings, general, general_text)
    check_base_logits(settings, config, general_text, dtype)
    return Inputs(
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        tasks=tasks,
        scorers=scorers,
        general=general,
        general_importance=general_text,
        judged=judged,
        arguments=settings.training_arguments(),
    )


def _tokenizer(settings: Settings, config: Any) -> Processing:
    """Return the model's tokenizer or processor. If all rows are token ids, a model may have none."""
    try:
        return load_tokenizer(settings.model, config)
    except UserError:
        if reads_images(config) or not holds_token_ids(settings.data):
            raise
    logger.warning("%s has no tokenizer: token ids are shown as numbers", settings.model.model_name_or_path)
    return token_ids_tokenizer(config)


def _seed(settings: Settings) -> int:
    """Return --seed before TrainingArguments is built, which refuses it if it is no number."""
    given = settings.flag("seed") or ""
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else TrainingArguments.seed


def with_rate(settings: Settings, config: Any) -> Settings:
    """Return settings whose learning rate, if it is a recipe's, is in proportion to the model's weights; say so."""
    rate = settings.recipe_rate
    if rate is None:
        return settings
    recipe, source = settings.method.recipe, model_source(str(settings.model.model_name_or_path))
    size = size_of_files(source, vocabulary_of(config))
    if size is None:
        logger.warning(
            "--recipe %s was measured at --learning_rate %g on weights with a root mean square of %g; how large those "
            "of %s are could not be read from safetensors files: if they are smaller, give a smaller rate",
            *(recipe, rate, MEASURED_SIZE, settings.model.model_name_or_path),
        )
        return settings
    chosen = rate_in_proportion(rate, size)
    if chosen != rate:
        logger.warning(
            "--learning_rate %g: %g of --recipe %s, in proportion to this model's weights (root mean square %.2g; "
            "measured at %.2g)",
            *(chosen, rate, recipe, size, MEASURED_SIZE),
        )
    return settings.with_flags(learning_rate=chosen)


def with_precision(settings: Settings, dtype: torch.dtype) -> tuple[Settings, torch.dtype]:
    """Return settings that say the precision, and the dtype to load and train in.

    --bf16 and --fp16 decide. Without them, the dtype of the model's files decides whether DeepSpeed runs in bf16 or
    fp16. (With 16-bit weights and neither flag, DeepSpeed would take the optimizer step in 16 bits.)
    """
    arguments = settings.training_arguments()
    if arguments.bf16 or arguments.fp16:
        _say_slow(torch.bfloat16 if arguments.bf16 else torch.float16)
        return settings, torch.bfloat16 if arguments.bf16 else torch.float16
    flag = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if flag is None:
        return settings, torch.float32
    logger.warning("the model's files are %s: training with --%s", str(dtype).removeprefix("torch."), flag)
    _say_slow(dtype)
    return settings.with_flags(**{flag: True}), dtype


def _say_slow(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and bf16_is_slow():
        logger.warning(
            "this processor has no AVX-512, so bf16 is several times slower here than fp32: --dtype float32 without "
            "--bf16 is faster, with twice the memory for weights, and deltas that go on an fp32 copy of the model"
        )
