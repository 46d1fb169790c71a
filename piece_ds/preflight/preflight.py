"""preflight(): check a whole job before a weight is read and before anything is written."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from piece_ds.config.settings import Settings
from piece_ds.data.packs import pack_rows, packs_per_step
from piece_ds.methods.baseline import Baseline
from piece_ds.methods.method import SELECTION, Method
from piece_ds.methods.registry import find_method, names_of
from piece_ds.models.loading import empty_model
from piece_ds.preflight.accelerate_variables import check_accelerate_variables
from piece_ds.preflight.best_step import DECISIVE as OF_BEST_STEP
from piece_ds.preflight.best_step import check_best_step, decides_weights
from piece_ds.preflight.checkpointing import check_activation_checkpointing
from piece_ds.preflight.checks import (
    check_accumulation,
    check_kernels,
    check_loss_chunks,
    check_offload,
    check_overwrite,
    check_places,
    check_sources,
    check_training,
    resumes_from,
)
from piece_ds.preflight.inputs import Inputs, load_inputs
from piece_ds.preflight.loss_and_order import check_label_smoothing, check_lengths
from piece_ds.preflight.rank_consistency import require_rank_consistency
from piece_ds.preflight.sequences import check_sequences
from piece_ds.preflight.trainer_arguments import check_optimizer, check_own_evaluation, check_trainer_arguments
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.training.claim import Claim
from piece_ds.training.reporters import open_reporters
from piece_ds.training.run_folder import RunFolder

TRAIN, SELECT, EVALUATE = "train", "select", "evaluate"

# What decides the results; a resumed run must have the same.
DECISIVE = (
    "learning_rate",
    "per_device_train_batch_size",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "train_sampling_strategy",
    "optim",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def preflight(settings: Settings, job: str = TRAIN) -> Inputs:
    """Check everything that can be checked without the weights, and return what was read on the way.

    It starts torch.distributed and builds kernels that are missing. It writes nothing into the user's folders.

    Args:
        settings: of the job.
        job: TRAIN, SELECT or EVALUATE.
    Raises:
        UserError: a setting, file or folder cannot be used, or ranks were not started alike.
    """
    # The flags, without a file.
    method = find_method(settings.method.method)
    _check_flags(settings, job, method)
    check_loss_chunks(settings)

    check_places(settings)

    # The files, cheapest first.
    inputs = load_inputs(settings)
    settings, arguments = inputs.settings, inputs.arguments

    # What the method needs of settings, data and machine.
    if job != EVALUATE:
        check_sources(settings, len(inputs.tasks))
    judges = settings.evaluation
    keeps_best = judges.load_best_model_at_end or judges.early_stopping_patience is not None
    check_trainer_arguments(arguments, settings.given, keeps_best)
    check_accelerate_variables(arguments)
    if job == TRAIN:
        _check_model_options(inputs)
        inputs = replace(inputs, baseline=method.baseline(settings.baseline) if method.baseline is not None else None)
        masked = method.has_mask or settings.method.step_scale != "none"
        check_training(arguments, masked)
        check_sequences(settings, arguments, inputs.config, inputs.tasks, method)
        num_rows = _num_rows(inputs)
        allow_smaller = settings.output.incomplete_accumulation == "smaller_step"
        for name, count in num_rows.items():
            check_accumulation(name, count, arguments, allow_smaller)
        num_eval_rows = {task.name: len(task.eval) for task in inputs.tasks}
        check_own_evaluation(arguments, num_rows, num_eval_rows)
        check_best_step(settings, arguments, inputs.tasks, inputs.scorers)
        num_steps = [_num_steps(arguments, count) for count in num_rows.values()]
        check_optimizer(arguments, inputs.config, num_steps, masked)
        check_offload(method.name, arguments)
    if job != EVALUATE:
        check_kernels(method.name, arguments)
    require_rank_consistency(inputs)

    # Where it goes, and who is told.
    if job == TRAIN:
        claim = _claim_of(inputs)
        check_overwrite(settings, claim.folder.root)
        claim.check()
        inputs = replace(inputs, claim=claim, reporters=open_reporters(arguments.report_to, claim.folder.root))
    return inputs


def _check_flags(settings: Settings, job: str, method: Method) -> None:
    data, output_file = settings.data, settings.output.output_file
    if data.packing and method.baseline is not None and not method.packs:
        raise UserError(f"--packing is not proven with --method {method.name}, whose batches are its own")

    if job != TRAIN and settings.model.sequence_parallel_size > 1:
        raise UserError("--sequence_parallel_size belongs to train; the other jobs give each rank whole rows")

    # Each job needs its own files.
    if job == TRAIN:
        if settings.flag("output_dir") == "":
            raise UserError("--output_dir expects a folder, got nothing")
        if data.train_file is None and data.task_dir is None:
            raise UserError("no data: give --train_file F, or --task_dir D with --tasks A,B,C")
        return
    if job == SELECT:
        if not method.has_mask:
            raise UserError(
                f"--method {method.name} has no mask; piece_ds select expects one of {', '.join(names_of(SELECTION))}"
            )
        if output_file is None or data.train_file is None:
            raise UserError("piece_ds select needs --train_file F and --output_file MASK")
    elif output_file is None or not (data.task_dir or data.train_file):
        raise UserError("piece_ds evaluate needs --task_dir D with --tasks A,B, and --output_file F")
    if settings.model.model_name_or_path is None:
        raise UserError(f"piece_ds {job} needs --model_name_or_path M")


def _check_model_options(inputs: Inputs) -> None:
    """Raise UserError for options of training that the model's class or its rows do not allow."""
    settings, arguments = inputs.settings, inputs.arguments

    def make_model() -> nn.Module:
        return empty_model(inputs.config, settings.model.trust_remote_code)

    check_activation_checkpointing(arguments, make_model)
    check_label_smoothing(settings, arguments, make_model)
    check_lengths(arguments, inputs.tasks, inputs.tokenizer)


def _num_rows(inputs: Inputs) -> dict[str, int]:
    """Return the number of rows that each task trains on, or of packs of rows."""
    tasks, baseline = inputs.tasks, inputs.baseline
    num_tokens = inputs.settings.data.pack_tokens
    if num_tokens is not None:
        multiple = packs_per_step(inputs.arguments)
        return {task.name: len(pack_rows(task.name, task.train, num_tokens, multiple)) for task in tasks}
    return {
        task.name: baseline.num_rows(task, tasks[:index]) if baseline else len(task.train)
        for index, task in enumerate(tasks)
    }


def _num_steps(arguments: TrainingArguments, num_rows: int) -> int:
    """Return the number of optimizer steps of a task."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    rounds = -(-num_rows // (arguments.per_device_train_batch_size * world_size()))
    return math.ceil(arguments.num_train_epochs * max(1, -(-rounds // arguments.gradient_accumulation_steps)))


def _claim_of(inputs: Inputs) -> Claim:
    """Return the claim on --output_dir, not yet made."""
    settings, arguments = inputs.settings, inputs.arguments
    names = (*DECISIVE, *(OF_BEST_STEP if decides_weights(settings, arguments) else ()))
    decisive = {name: _plain(getattr(arguments, name)) for name in names}
    # Any number of ranks may resume a masked run, as long as a step has the same micro-batches.
    decisive["gradient_accumulation_steps * ranks"] = arguments.gradient_accumulation_steps * world_size()

    # A run without a mask resumes only with the sharding it began with.
    sharding = _sharding_of(arguments)
    configuration = {**settings.resolved(), "TrainingArguments": decisive}
    if isinstance(inputs.baseline, Baseline):  # only DeepSpeed's own checkpoint holds all masters and moments
        configuration |= sharding
    return Claim(
        RunFolder(Path(arguments.output_dir)),
        configuration,
        resume=resumes_from(arguments),
        overwrite=settings.output.overwrite_output_dir,
        also={
            "all_training_arguments": arguments.to_dict(),
            "deepspeed": arguments.hf_deepspeed_config.config,
            **sharding,
        },
    )


def _sharding_of(arguments: TrainingArguments) -> dict[str, Any]:
    stage = arguments.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    return {"world_size": world_size(), "zero_stage": stage}


def _plain(value: Any) -> Any:
    """Return value as JSON has it: enums of transformers become their value."""
    return getattr(value, "value", value)
