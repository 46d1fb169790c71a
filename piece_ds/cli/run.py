"""One run of launch/train.py's work: from checked settings to results."""

from pathlib import Path
from typing import Any

from piece_ds.config.parsing import Settings
from piece_ds.methods.registry import BASELINES
from piece_ds.preflight.checks import (
    check_accumulation,
    check_kernels,
    check_method,
    check_offload,
    check_sources,
    check_training,
    resumes_from,
)
from piece_ds.preflight.inputs import load_inputs
from piece_ds.preflight.rank_consistency import require_rank_consistency
from piece_ds.report.results import RunResults
from piece_ds.runtime.deterministic import deterministic_run
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.training.reporters import open_reporters
from piece_ds.training.run_folder import RunFolder
from piece_ds.training.stream import Stream, run_stream

# What decides the results; a resumed run must have the same.
DECISIVE = (
    "learning_rate",
    "per_device_train_batch_size",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "train_sampling_strategy",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def train(settings: Settings) -> tuple[RunResults, RunFolder]:
    """Check everything that can be checked without the weights, then run the stream.

    Raises:
        UserError: see the checks; nothing has been written then.
    """
    check_method(settings.method.method)
    if settings.data.train_file is None and settings.data.task_dir is None:
        raise UserError("no data: give --train_file F, or --task_dir D with --tasks A,B,C")
    inputs = load_inputs(settings)
    settings, arguments = inputs.settings, inputs.arguments
    check_sources(settings, len(inputs.tasks))
    baseline = BASELINES[settings.method.method](settings.baseline) if settings.method.method in BASELINES else None
    check_training(arguments, masked=baseline is None)
    for index, task in enumerate(inputs.tasks):
        num_rows = baseline.num_rows(task, inputs.tasks[:index]) if baseline else len(task.train)
        check_accumulation(task.name, num_rows, arguments, settings.output.incomplete_accumulation == "smaller_step")
    check_offload(settings.method.method, arguments)
    check_kernels(settings.method.method, arguments)
    require_rank_consistency(inputs)
    folder = RunFolder(Path(arguments.output_dir))
    reporters = open_reporters(arguments.report_to, folder.root)
    resume = resumes_from(arguments)
    decisive = {name: _plain(getattr(arguments, name)) for name in DECISIVE}
    # Any number of ranks may go on with a masked run, as long as a step has the same micro-batches.
    decisive["gradient_accumulation_steps * ranks"] = arguments.gradient_accumulation_steps * world_size()
    configuration = {**settings.resolved(), "TrainingArguments": decisive}
    stage = arguments.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    cut = {"world_size": world_size(), "zero_stage": stage}
    if baseline is not None:  # only DeepSpeed's own checkpoint holds all masters and moments
        configuration |= cut
    also = {"all_training_arguments": arguments.to_dict(), "deepspeed": arguments.hf_deepspeed_config.config, **cut}
    folder.claim(configuration, resume, also)
    stream = Stream(
        settings,
        inputs.tokenizer,
        inputs.tasks,
        inputs.scorers,
        inputs.general,
        inputs.dtype,
        folder,
        arguments.per_device_eval_batch_size,
        arguments.seed,
        reporters,
        baseline,
        inputs.general_importance,
    )
    with deterministic_run(settings.output.deterministic):
        return run_stream(stream, resume), folder


def _plain(value: Any) -> Any:
    """value as JSON has it: enums of transformers by their value."""
    return getattr(value, "value", value)
