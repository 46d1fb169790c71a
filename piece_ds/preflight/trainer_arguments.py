"""Refuse what TrainingArguments ask for and cannot have, or say that it has no effect, before a weight is read.

Optimizer and schedule are made here once on a dummy parameter. So what transformers and torch would refuse after the
model is loaded, they refuse now.
"""

import copy
import logging
import math
from collections.abc import Collection
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from piece_ds.config.deepspeed_configs import contradiction
from piece_ds.preflight.checks import PROVEN_OPTIM
from piece_ds.preflight.idle_fields import unmet_needs
from piece_ds.preflight.training_fields import FIELDS, NO_EFFECT, REFUSED
from piece_ds.runtime.distributed import is_main, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.zero.config_file import check_deepspeed_config
from piece_ds.zero.file_optimizer import ADAGRAD, compile_optimizer, settle_optimizer

logger = logging.getLogger(__name__)

# What libraries raise for values that they cannot use.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ArithmeticError, OSError)

# Keys of accelerator_config that change neither rows nor steps.
_ACCELERATOR_FREE = ("non_blocking", "use_seedable_sampler")
# Schedules to which transformers hands no options.
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_OF_A_PUSH = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")


def check_trainer_arguments(arguments: TrainingArguments, given: Collection[str], keeps_best: bool = False) -> None:
    """Raise UserError for a field that is refused or out of range; log which of the given fields have no effect.

    Args:
        arguments: of the run.
        given: names of the flags and YAML keys that the user has set.
        keeps_best: whether --load_best_model_at_end or --early_stopping_patience is given.
    """
    # Refuse: only a field that the user has set, and only if its value asks for something.
    neutral = {field.name: field.default for field in fields(arguments) if field.init}
    for name, treatment in FIELDS.items():
        value = getattr(arguments, name, None)
        if treatment.kind == REFUSED and name in given and _is_asked(value, neutral.get(name)):
            raise UserError(f"--{name} {_shown(value)}: {treatment.note}")
        expected = treatment.range_error(value)
        if expected is not None:
            raise UserError(f"--{name} expects {expected}, got {value}")
    if arguments.max_steps == 0:
        raise UserError("--max_steps expects a number of steps, or -1 for --num_train_epochs, got 0")
    _check_workers(arguments)
    _check_accelerator(arguments)
    alone = next((name for name in _OF_A_PUSH if name in given and getattr(arguments, name)), None)
    if alone is not None and not arguments.push_to_hub:
        raise UserError(f"--{alone} belongs to --push_to_hub, which is not given")

    # Tell: settings that are ignored, and fields of a newer transformers.
    idle = [name for name in sorted(given) if name in FIELDS and FIELDS[name].kind == NO_EFFECT]
    idle = [name for name in idle if getattr(arguments, name) != neutral[name]]
    reasons = {name: FIELDS[name].note for name in idle}
    set_ones = [name for name in sorted(given) if name in neutral and getattr(arguments, name) != neutral[name]]
    reasons |= {name: f"needs {text}" for name, text in unmet_needs(arguments, set_ones, keeps_best).items()}
    if reasons:
        logger.warning("given, but without effect here: %s", "; ".join(f"--{n} ({why})" for n, why in reasons.items()))
    unknown = sorted((set(given) & neutral.keys()) - FIELDS.keys())
    if unknown:
        logger.warning(
            "passed on to transformers, but never tried with this package: %s", ", ".join(f"--{n}" for n in unknown)
        )


def _is_asked(value: Any, neutral: Any) -> bool:
    return bool(value) and value != neutral


def _shown(value: Any) -> str:
    return f"{value}"[:80]


def _check_workers(arguments: TrainingArguments) -> None:
    if arguments.dataloader_num_workers == 0:
        for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context"):
            if getattr(arguments, f"dataloader_{name}"):
                raise UserError(f"--dataloader_{name} needs --dataloader_num_workers 1 or more")
    context = arguments.dataloader_multiprocessing_context
    if context and context not in torch.multiprocessing.get_all_start_methods():
        known = ", ".join(torch.multiprocessing.get_all_start_methods())
        raise UserError(f"--dataloader_multiprocessing_context {context!r} is unknown; known: {known}")


def _check_accelerator(arguments: TrainingArguments) -> None:
    """Raise UserError for a key of accelerator_config that changes which rows a rank takes, or what a step is."""
    config = arguments.accelerator_config
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _ACCELERATOR_FREE and value not in (field.default, None, False):
            raise UserError(
                f"--accelerator_config {field.name} {_shown(value)}: it changes which rows a rank takes or what a "
                f"step is; known to be safe are {' and '.join(_ACCELERATOR_FREE)}"
            )
        if field.name in _ACCELERATOR_FREE and not isinstance(value, bool):
            raise UserError(f"--accelerator_config {field.name} expects true or false, got {value!r:.80}")
    if not config.even_batches:
        raise UserError("--accelerator_config even_batches false: ranks with fewer rows would leave the others waiting")


def check_own_evaluation(arguments: TrainingArguments, num_rows: dict[str, int], num_eval_rows: dict[str, int]) -> None:
    """Raise UserError if the trainer would have no batch, or nothing to evaluate.

    Args:
        arguments: of the run.
        num_rows: task -> number of rows that it trains on.
        num_eval_rows: task -> number of rows that --eval_strategy evaluates.
    """
    # Every task needs a batch on each rank.
    evaluates = arguments.eval_strategy != "no"
    for name, rows, batch in (
        *((name, rows, arguments.per_device_train_batch_size) for name, rows in num_rows.items()),
        *((name, rows, arguments.per_device_eval_batch_size) for name, rows in num_eval_rows.items() if evaluates),
    ):
        if arguments.dataloader_drop_last and rows < batch * world_size():
            raise UserError(
                f"--dataloader_drop_last would leave no batch of task {name}: {rows} rows are fewer than {batch} on "
                f"each of {world_size()} ranks; lower the batch size, also --per_device_eval_batch_size"
            )

    # An evaluation needs rows.
    if arguments.eval_on_start and not evaluates:
        raise UserError("--eval_on_start needs --eval_strategy steps or epoch")
    empty = [name for name, rows in num_eval_rows.items() if evaluates and rows == 0]
    if empty:
        raise UserError(
            f"--eval_strategy {_plain(arguments.eval_strategy)}: task {empty[0]} has no eval rows; give --eval_file or "
            "--validation_share, or leave it out"
        )


def check_optimizer(arguments: TrainingArguments, config: Any, num_steps: Collection[int], masked: bool) -> None:
    """Raise UserError if the optimizer, its schedule or the DeepSpeed file's numbers cannot be used.

    Args:
        arguments: of the run.
        config: the model's.
        num_steps: optimizer steps of each task.
        masked: whether steps act on single weights.
    """
    _check_precision(arguments)
    holder, content = arguments.hf_deepspeed_config, _file_with_numbers(arguments, config, max(num_steps))
    notes = settle_optimizer(content)
    check_deepspeed_config(content, masked)
    if _plain(arguments.optim) == "adagrad":
        raise UserError(ADAGRAD.format(flag="--optim adagrad"))
    for note in notes if is_main() else ():
        logger.warning("--deepspeed: %s", note)

    # DeepSpeed makes what its file describes.
    if holder.config.get("optimizer"):
        compile_optimizer(content)
        return
    optimizer = _optimizer(arguments)
    if not holder.config.get("scheduler"):
        for steps in sorted(set(num_steps)):
            _check_schedule(arguments, optimizer, steps)


def _check_precision(arguments: TrainingArguments) -> None:
    """Raise UserError if a precision would also be another one's, or DeepSpeed would refuse it on this device."""
    from deepspeed.accelerator import get_accelerator

    for name in ("bf16", "fp16"):
        if getattr(arguments, f"{name}_full_eval") and not getattr(arguments, name):
            raise UserError(
                f"--{name}_full_eval: DeepSpeed has one precision for training and evaluation, so that it would train "
                f"in {name} too: give --{name}, or leave it out"
            )

    device = get_accelerator()
    if arguments.fp16 and not device.is_fp16_supported():
        raise UserError(f"--fp16: DeepSpeed does not train in fp16 on this device ({device.device_name()}): use --bf16")
    if arguments.bf16 and not device.is_bf16_supported():
        raise UserError(f"--bf16: DeepSpeed does not train in bf16 on this device ({device.device_name()}): use --fp16")


def _optimizer(arguments: TrainingArguments) -> torch.optim.Optimizer:
    model = nn.Linear(2, 2)
    if arguments.optim_args and _plain(arguments.optim) in PROVEN_OPTIM:  # transformers drops them silently
        raise UserError(
            f"--optim_args {_shown(arguments.optim_args)}: {_plain(arguments.optim)} takes no options from there; "
            "leave it out (--adam_beta1, --adam_epsilon ... are flags)"
        )
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        known: torch.optim.Optimizer = made(model.parameters(), **options)
        _check_optimizer_options(arguments, model, options)
    except _REFUSALS as error:
        given = f" with --optim_args {arguments.optim_args}" if arguments.optim_args else ""
        raise UserError(f"--optim {_plain(arguments.optim)}{given} cannot be made: {_first_line(error)}") from error
    return known


def _check_optimizer_options(arguments: TrainingArguments, model: nn.Module, options: dict[str, Any]) -> None:
    """Raise UserError if an option of --optim_args changes nothing: transformers takes those it knows, silently."""
    given = [item for item in (arguments.optim_args or "").replace(" ", "").split(",") if item]
    for item in given:
        others = copy.copy(arguments)
        others.optim_args = ",".join(other for other in given if other != item) or None
        if item.startswith("weight_decay=") or Trainer.get_optimizer_cls_and_kwargs(others, model)[1] == options:
            raise UserError(
                f"--optim_args {_shown(item)} changes nothing of --optim {_plain(arguments.optim)}: leave it out "
                "(--learning_rate, --weight_decay, --adam_beta1 ... are flags)"
            )


def _check_schedule(arguments: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int) -> None:
    # Some schedules fail only at a certain step: around the warm-up, or at the end.
    kind, options = _plain(arguments.lr_scheduler_type), arguments.lr_scheduler_kwargs
    if options and not isinstance(options, dict):
        raise UserError(f"--lr_scheduler_kwargs expects a JSON object, got {_shown(options)}")
    if options and kind in _WITHOUT_OPTIONS:  # transformers drops them silently
        raise UserError(f"--lr_scheduler_type {kind} takes no options: leave --lr_scheduler_kwargs {options} out")
    endless = [name for name, value in (options or {}).items() if isinstance(value, float) and not math.isfinite(value)]
    if endless:
        raise UserError(f"--lr_scheduler_kwargs: {endless[0]} expects a finite number, got {options[endless[0]]}")
    try:
        warmup = arguments.get_warmup_steps(steps)
        schedule = get_scheduler(
            kind, copy.deepcopy(optimizer), warmup, num_training_steps=steps, scheduler_specific_kwargs=options or None
        )
        at = sorted({0, 1, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps} & set(range(steps + 1)))
        factors = [function(step) for function in getattr(schedule, "lr_lambdas", ()) for step in at]
        if hasattr(schedule, "num_bad_epochs"):
            _try_metric(schedule)
    except _REFUSALS as error:
        given = f" with --lr_scheduler_kwargs {options}" if options else " without --lr_scheduler_kwargs"
        reason = _first_line(error).replace("`", "")
        raise UserError(
            f"--lr_scheduler_type {kind}{given} cannot be made for {steps} steps: {reason}; options of the schedule go "
            "into --lr_scheduler_kwargs as JSON, such as '{\"min_lr\": 1e-6}'"
        ) from error
    if not all(isinstance(factor, int | float) and math.isfinite(factor) and factor >= 0 for factor in factors):
        raise UserError(
            f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {options} makes learning rates below 0 or not "
            f"finite within {steps} steps"
        )


def _try_metric(schedule: Any) -> None:
    """Let the metric of reduce_lr_on_plateau or greedy improve and worsen: each option is read on the way."""
    for metric in (2.0, 1.0):
        schedule.step(metric)
    schedule.patience = 0
    for metric in (0.5, 0.4, 0.3, 0.2, 2.0, 3.0, 4.0, 5.0):
        schedule.step(metric)


def _file_with_numbers(arguments: TrainingArguments, config: Any, steps: int) -> dict[str, Any]:
    """Return the DeepSpeed file's content with the flags' numbers in place of "auto".

    Raises:
        UserError: numbers in the file contradict the flags, as transformers would find later.
    """
    holder = copy.deepcopy(arguments.hf_deepspeed_config)
    try:
        holder.trainer_config_finalize(arguments, SimpleNamespace(config=config), steps)
    except ValueError as error:
        if "DeepSpeed config values" not in str(error):
            raise UserError(f"--deepspeed: {_first_line(error)}") from error
        raise UserError(contradiction(error)) from error
    content: dict[str, Any] = holder.config
    return content


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
