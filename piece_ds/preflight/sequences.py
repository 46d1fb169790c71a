"""Refuse --sequence_parallel_size where ranks cannot share rows, before a weight is read."""

from types import SimpleNamespace
from typing import Any, cast

import pyarrow.compute as compute
from torch import nn
from transformers import TrainingArguments

from piece_ds.config.settings import Settings
from piece_ds.data.tasks import Task
from piece_ds.methods.method import GENERAL_TEXT, Method
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.zero.sequence_attention import WITHOUT_MASK
from piece_ds.zero.sequence_parallel import attention_window


def check_sequences(
    settings: Settings, arguments: TrainingArguments, config: Any, tasks: list[Task], method: Method
) -> None:
    """Raise UserError if a run's ranks cannot share rows as it asks, or if that is not proven with another setting.

    Args:
        settings: of the run.
        arguments: made of them.
        config: the model's.
        tasks: of the stream.
        method: that is run.
    """
    size = settings.model.sequence_parallel_size
    if size == 1:
        return
    said = f"--sequence_parallel_size {size}"
    if world_size() % size:
        raise UserError(f"{said} does not divide the {world_size()} ranks of this run")

    # The model.
    text = config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, what, None)
        if not isinstance(heads, int) or heads % size:
            raise UserError(f"{said} does not divide the model's {what} {heads}: ranks exchange heads for tokens")
    window = attention_window(cast(nn.Module, SimpleNamespace(config=config)))
    longest = max(_longest(task) for task in tasks)
    if window is not None and longest > window:
        raise UserError(
            f"{said}: the longest row has {longest} tokens, and the model attends to windows of {window}, which "
            "DeepSpeed's exchange drops"
        )
    chosen = settings.model.attn_implementation
    if chosen is not None and chosen not in WITHOUT_MASK:
        raise UserError(f"{said} needs --attn_implementation {' or '.join(WITHOUT_MASK)}, got {chosen}")

    # What it is not proven with.
    flags = settings.method
    not_proven = {
        f"--method {method.name}": not method.has_mask or method.needs == GENERAL_TEXT or method.only_linear,
        "--packing": settings.data.packing,
        "rows with images": any(task.has_images for task in tasks),
        "--loss_chunk_tokens": settings.model.loss_chunk_tokens > 0,
        "--label_smoothing_factor": arguments.label_smoothing_factor > 0,
        "--neftune_noise_alpha": bool(arguments.neftune_noise_alpha),
    }
    found = next((what for what, is_asked in not_proven.items() if is_asked), None)
    if found is not None:
        raise UserError(f"{said} is not proven with {found}: leave one of them out")

    # Statistics go through the same exchange, which is made for micro-batches of one size.
    if flags.mask_file is None and flags.importance_batch_size > arguments.per_device_train_batch_size:
        raise UserError(
            f"{said}: --importance_batch_size {flags.importance_batch_size} is more than the "
            f"{arguments.per_device_train_batch_size} rows of --per_device_train_batch_size, for which ranks exchange"
        )


def _longest(task: Task) -> int:
    """Return how many tokens the task's longest training row has."""
    return compute.max(compute.list_value_length(task.train.data.column("input_ids"))).as_py() or 0
