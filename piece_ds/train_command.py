"""launch/train.py: a task or a stream of tasks on a model, or the embedded default."""

from pathlib import Path
from typing import Any

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.checks import (
    check_accumulation,
    check_deepspeed_file,
    check_mask,
    check_method,
    check_training,
    resumes_from,
)
from piece_ds.command import start_distributed, with_default_config
from piece_ds.distributed import is_main, world_size
from piece_ds.engine import Stream, run_stream
from piece_ds.errors import UserError
from piece_ds.flags import default_flags, with_precision
from piece_ds.model import dtype_of, load_config, load_tokenizer, require_weights
from piece_ds.report import RunResults, print_results, write_report
from piece_ds.run_folder import RunFolder
from piece_ds.stream import load_general, load_task_stream

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
    check_deepspeed_file(settings.flag("deepspeed"))
    config = load_config(settings.model)
    require_weights(settings.model)
    check_mask(settings, config)
    tokenizer = load_tokenizer(settings.model)
    dtype = dtype_of(settings.model, config)
    tasks = load_task_stream(settings.data, tokenizer)
    general = None
    if settings.data.general_file:
        general = load_general(settings.data.general_file, tokenizer, settings.data.cutoff,
                               max_rows=settings.data.max_eval_samples)  # fmt: skip
    start_distributed()
    settings, dtype = with_precision(settings, dtype)
    arguments = settings.training_arguments()
    check_training(arguments, masked=settings.method.method != "seqft")
    for task in tasks:
        check_accumulation(task, arguments, settings.output.incomplete_accumulation == "smaller_step")
    folder = RunFolder(Path(arguments.output_dir))
    resume = resumes_from(arguments)
    decisive = {name: _plain(getattr(arguments, name)) for name in DECISIVE}
    folder.claim({**settings.resolved(), "TrainingArguments": decisive, "world_size": world_size()}, resume)
    eval_batch_size = arguments.per_device_eval_batch_size
    return run_stream(Stream(settings, tokenizer, tasks, general, dtype, folder, eval_batch_size), resume), folder


def show(runs: list[RunResults], folder: RunFolder) -> None:
    """Print the result tables and write report.html with its figures. Rank 0 alone does something."""
    if is_main():
        print_results(runs)
        print(f"report: {write_report(folder.root, runs)}")


def _plain(value: Any) -> Any:
    """value as JSON has it: enums of transformers by their value."""
    return getattr(value, "value", value)
