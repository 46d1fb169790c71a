"""What `accelerate launch` was told, against what the run does: a contradiction is refused, never ignored.

accelerate passes its flags, and those of its configuration file, in the environment. This package reads its own.
"""

import os

import torch
from transformers import TrainingArguments

from piece_ds.runtime.errors import UserError

_YES = ("y", "yes", "t", "true", "on", "1")


def check_accelerate_variables(arguments: TrainingArguments) -> None:
    """Raise UserError if accelerate's variables ask for a precision, a device or steps that the run does not have.

    What they can hold at all is checked before: see launch_environment.py.

    Args:
        arguments: of the run, with its precision settled.
    """
    way_out = "give that flag, or leave it out of accelerate's flags and configuration (accelerate config)"

    # The precision; the model's files may have given the same one.
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked in ("bf16", "fp16") and not getattr(arguments, asked):
        trained = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {asked} (accelerate launch --mixed_precision), but this run is in "
            f"{trained}, and --{asked} is not given: {way_out}"
        )

    # The device: without an accelerator there is but one.
    if _is_yes("ACCELERATE_USE_CPU") and not arguments.use_cpu and torch.cuda.is_available():
        raise UserError(
            f"ACCELERATE_USE_CPU is set (accelerate launch --cpu), but this run uses the GPU, and --use_cpu is not "
            f"given: {way_out}"
        )

    # The steps.
    micro_batches = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    if micro_batches not in ("", "1", str(arguments.gradient_accumulation_steps)):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {micro_batches[:80]!r} (accelerate launch), but this run's "
            f"--gradient_accumulation_steps is {arguments.gradient_accumulation_steps}: {way_out}"
        )
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none").strip().lower()
    if clipping not in ("", "none") and not _is_number(clipping, arguments.max_grad_norm):
        raise UserError(
            f"ACCELERATE_GRADIENT_CLIPPING is {clipping[:80]!r} (accelerate launch), but this run's --max_grad_norm is "
            f"{arguments.max_grad_norm:g}: {way_out}"
        )


def _is_yes(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in _YES


def _is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
