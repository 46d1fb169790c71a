"""Flags that a launch script adds to the user's: defaults for this machine, and the precision of the model's files."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from piece_ds.config.parsing import Settings, given_names
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

# Where TrainingArguments' own defaults do not suit: a log line is cheap and a checkpoint of an 8B model is 100 GB.
DEFAULTS = {"logging_steps": 10, "save_strategy": "no", "report_to": "none"}


def default_flags(argv: list[str]) -> dict[str, Any]:
    """Values for flags that the user does not give."""
    from deepspeed.accelerator import get_accelerator

    defaults: dict[str, Any] = {**DEFAULTS, "use_cpu": get_accelerator().device_name() == "cpu"}
    if "save_steps" in given_names(argv):
        del defaults["save_strategy"]
    if not sys.stderr.isatty():
        defaults["disable_tqdm"] = True
    return defaults


def with_precision(settings: Settings, dtype: torch.dtype) -> tuple[Settings, torch.dtype]:
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


DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"


def with_default_config(argv: list[str]) -> list[str]:
    """argv with --deepspeed ds_configs/zero3.json where no configuration is named, here or in a YAML file."""
    return argv if "deepspeed" in given_names(argv) else ["--deepspeed", str(DEFAULT_CONFIG), *argv]


def timeout_seconds(text: str | None) -> float | None:
    """--ddp_timeout before TrainingArguments is built, which looks for a process group."""
    try:
        seconds = None if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if seconds is not None and not seconds > 0:
        raise UserError(f"--ddp_timeout expects seconds, got {text!r}")
    return seconds
