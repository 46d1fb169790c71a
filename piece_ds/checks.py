"""What is refused before a weight is read: settings that do not fit each other or the data."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from piece_ds.arguments import Settings
from piece_ds.checkpoint import check_mask_file
from piece_ds.distributed import world_size
from piece_ds.errors import UserError, nearest
from piece_ds.importance import estimator_names
from piece_ds.model import empty_layout
from piece_ds.stream import Task

logger = logging.getLogger(__name__)

BASELINES = ["seqft"]


def check_method(method: str) -> None:
    """Raise UserError unless method is one that exists."""
    known = [*estimator_names(), *BASELINES]
    if method not in known:
        raise UserError(f"--method {method!r} is unknown; known: {', '.join(known)}.{nearest(method, known)}")


def check_deepspeed_file(path: str | None) -> None:
    """Raise UserError unless path is a readable DeepSpeed configuration."""
    if path is None or not Path(path).is_file():
        raise UserError(f"--deepspeed {path}: no such file; ds_configs/ has one for every ZeRO stage")
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed {path}, line {error.lineno}: not JSON ({error.msg})") from error


def check_mask(settings: Settings, config: Any) -> None:
    """Raise UserError where --mask_file is damaged or of another model; only the model's configuration is needed."""
    if settings.method.mask_file is None:
        return
    if settings.method.method == "seqft":
        raise UserError("--mask_file has no meaning with --method seqft, which trains every weight")
    check_mask_file(settings.method.mask_file, empty_layout(settings.model, config))


def check_accumulation(task: Task, arguments: TrainingArguments, allow_smaller: bool) -> None:
    """Raise UserError where the last step of an epoch would accumulate fewer micro-batches than the others.

    Nothing would be dropped, but that step's rows would weigh more; it is an option, not an accident.
    """
    rows, accumulation = len(task.train), arguments.gradient_accumulation_steps
    per_round = arguments.per_device_train_batch_size * world_size()
    rounds = -(-rows // per_round)
    steps = -(-rounds // accumulation)
    ends_early = 0 < arguments.max_steps <= rounds // accumulation
    if rounds % accumulation == 0 or ends_early:
        return
    left = rounds % accumulation
    message = (
        f"task {task.name}: {rows} rows make {rounds} micro-batches of {arguments.per_device_train_batch_size} rows on "
        f"{world_size()} ranks, and gradient_accumulation_steps is {accumulation}: the last of {steps} steps of an "
        f"epoch would accumulate {left} instead of {accumulation}"
    )
    if not allow_smaller:
        raise UserError(f"{message}; change the batch, or accept it with --incomplete_accumulation smaller_step")
    logger.warning("%s", message)
