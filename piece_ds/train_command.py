"""launch/train.py: a task or a stream of tasks on a model, or the embedded default."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.checks import check_accumulation, check_deepspeed_file, check_mask, check_method
from piece_ds.command import start_distributed, with_default_config
from piece_ds.distributed import is_main
from piece_ds.engine import Stream, run_stream
from piece_ds.errors import UserError
from piece_ds.model import dtype_of, load_config, load_tokenizer
from piece_ds.report import RunResults, print_results, write_report
from piece_ds.run_folder import RunFolder
from piece_ds.stream import load_general, load_task_stream

logger = logging.getLogger(__name__)

# Where TrainingArguments' own defaults do not suit: a log line is cheap and a checkpoint of an 8B model is 100 GB.
DEFAULTS = {"logging_steps": 10, "save_strategy": "no", "report_to": "none"}

# What decides the results; a resumed run must have the same.
DECISIVE = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """The whole job of launch/train.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    settings = parse(with_default_config(argv), _defaults(argv))
    if settings.model.model_name_or_path is None:
        from piece_ds.embedded_command import run_embedded

        show(*run_embedded(with_default_config(argv), settings, _defaults(argv)))
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
    config = load_config(settings.model)
    check_mask(settings, config)
    tokenizer = load_tokenizer(settings.model)
    dtype = dtype_of(settings.model, config)
    settings, dtype = _with_precision(settings, dtype)
    arguments = settings.training_arguments()
    check_deepspeed_file(arguments.deepspeed)
    tasks = load_task_stream(settings.data, tokenizer)
    start_distributed()
    for task in tasks:
        check_accumulation(task, arguments, settings.output.incomplete_accumulation == "smaller_step")
    general = None
    if settings.data.general_file:
        general = load_general(settings.data.general_file, tokenizer, settings.data.cutoff,
                               max_rows=settings.data.max_eval_samples)  # fmt: skip
    folder = RunFolder(Path(arguments.output_dir))
    resume = bool(arguments.resume_from_checkpoint)
    decisive = {name: getattr(arguments, name) for name in DECISIVE}
    folder.claim({**settings.resolved(), "TrainingArguments": {k: _plain(v) for k, v in decisive.items()}}, resume)
    eval_batch_size = arguments.per_device_eval_batch_size
    return run_stream(Stream(settings, tokenizer, tasks, general, dtype, folder, eval_batch_size), resume), folder


def show(runs: list[RunResults], folder: RunFolder) -> None:
    """Print the result tables and write report.html with its figures. Rank 0 alone does something."""
    if is_main():
        print_results(runs)
        print(f"report: {write_report(folder.root, runs)}")


def _defaults(argv: list[str]) -> dict[str, Any]:
    """Values for flags that the user does not give."""
    from deepspeed.accelerator import get_accelerator

    defaults: dict[str, Any] = {**DEFAULTS, "use_cpu": get_accelerator().device_name() == "cpu"}
    if any(a.split("=")[0] == "--save_steps" for a in argv):
        del defaults["save_strategy"]
    if not sys.stderr.isatty():
        defaults["disable_tqdm"] = True
    return defaults


def _with_precision(settings: Settings, dtype: torch.dtype) -> tuple[Settings, torch.dtype]:
    """--bf16 and --fp16 decide the dtype; without them the model's own decides whether DeepSpeed runs in bf16 or fp16.

    (With 16-bit weights and neither flag DeepSpeed would take the optimizer step in 16 bits.)
    """
    arguments = settings.training_arguments()
    if arguments.bf16 or arguments.fp16:
        return settings, torch.bfloat16 if arguments.bf16 else torch.float16
    flag = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if flag is None:
        return settings, torch.float32
    logger.warning("the model's files are %s: training with --%s", str(dtype).removeprefix("torch."), flag)
    return settings.with_flags(**{flag: True}), dtype


def _plain(value: Any) -> Any:
    """value as JSON has it: enums of transformers by their value."""
    return getattr(value, "value", value)
