"""launch/train.py: a task or a stream of tasks on a model, or the embedded default."""

from pathlib import Path
from typing import Any

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.checks import (
    check_accumulation,
    check_method,
    check_training,
    resumes_from,
)
from piece_ds.command import with_default_config
from piece_ds.distributed import is_main, world_size
from piece_ds.engine import Stream, run_stream
from piece_ds.errors import UserError
from piece_ds.flags import default_flags
from piece_ds.inputs import load_inputs
from piece_ds.report import RunResults, print_results, write_report
from piece_ds.run_folder import RunFolder

# What decides the results; a resumed run must have the same.
DECISIVE = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "train_sampling_strategy", "optim", "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """The whole job of launch/train.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    settings = parse(with_default_config(argv), default_flags(argv))
    if settings.model.model_name_or_path is None:
        from piece_ds.embedded_command import run_embedded

        show(*run_embedded(with_default_config(argv), settings, default_flags(argv)))
        return
    results, folder = train(settings)
    show([results], folder)


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
    check_training(arguments, masked=settings.method.method != "seqft")
    for task in inputs.tasks:
        check_accumulation(task, arguments, settings.output.incomplete_accumulation == "smaller_step")
    folder = RunFolder(Path(arguments.output_dir))
    resume = resumes_from(arguments)
    decisive = {name: _plain(getattr(arguments, name)) for name in DECISIVE}
    folder.claim({**settings.resolved(), "TrainingArguments": decisive, "world_size": world_size()}, resume)
    stream = Stream(
        settings,
        inputs.tokenizer,
        inputs.tasks,
        inputs.general,
        inputs.dtype,
        folder,
        arguments.per_device_eval_batch_size,
    )
    return run_stream(stream, resume), folder


def show(runs: list[RunResults], folder: RunFolder) -> None:
    """Print the result tables and write report.html with its figures. Rank 0 alone does something."""
    if is_main():
        print_results(runs)
        print(f"report: {write_report(folder.root, runs)}")


def _plain(value: Any) -> Any:
    """value as JSON has it: enums of transformers by their value."""
    return getattr(value, "value", value)
