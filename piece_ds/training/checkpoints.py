"""Handle a trainer's checkpoints: each is complete or ignored, and any ranks and ZeRO stage resume a masked run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments

from piece_ds.checkpoint.manifest import is_complete, verify_manifest
from piece_ds.checkpoint.selected_file import load_selected_state
from piece_ds.runtime.distributed import broadcast_object, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import not_written
from piece_ds.runtime.schema import read_json
from piece_ds.training.checkpoint_state import check_progress
from piece_ds.training.run_folder import checkpoints_in
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate

CUT_NAME, SELECTED_NAME = "piece_checkpoint.json", "selected.safetensors"

Update = MaskedUpdate | CompactUpdate


def cut_of(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the sharding that a checkpoint of DeepSpeed is written for.

    It can be loaded if all of this is the same.
    """
    config = arguments.hf_deepspeed_config
    zero = {
        key: config.get_value(f"zero_optimization.{key}") for key in ("stage", "offload_optimizer", "offload_param")
    }
    return {
        "format": "piece-checkpoint",
        "version": 1,
        "world_size": world_size(),
        "zero": zero,
        "data_types": config.get_value("data_types"),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a task, or None; the same on all ranks. A collective."""
    # By step, not by name: checkpoint-10 is newer than checkpoint-9.
    complete = [path for path in checkpoints_in(folder) if is_complete(path)]
    return broadcast_object(max(complete, key=step_of, default=None))


def step_of(checkpoint: Path | None) -> int:
    """Return the number of optimizer steps before a checkpoint; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])


def needs_resharding(checkpoint: Path, arguments: TrainingArguments, masked: bool) -> bool:
    """Check a checkpoint's files, then return whether it must be read in its resharded form. A collective.

    Args:
        checkpoint: folder of the checkpoint.
        arguments: of the resumed run.
        masked: whether the run trains a mask, which makes resharding possible.
    Raises:
        UserError: a file is damaged, or the checkpoint has another sharding and holds no selection.
    """
    try:
        verify_manifest(checkpoint, whole=True)
        check_progress(checkpoint, step_of(checkpoint))
    except UserError as error:
        if any(remedy in str(error) for remedy in (f"remove {checkpoint} ", "move it away")):
            raise
        raise UserError(f"{error}; remove {checkpoint} to resume from what was there before it") from None

    # Compare shardings as JSON, since one of them comes from a file.
    found = read_json(checkpoint / CUT_NAME, dict[str, Any], "checkpoint", "resume from an earlier one")
    now = json.loads(json.dumps(cut_of(arguments)))
    if found == now:
        return False
    if not masked:
        raise UserError(
            f"{checkpoint} was written with {_shown(found)}, this is {_shown(now)}: without a mask a "
            "checkpoint is resumed only as it was begun"
        )
    if not hasattr(Trainer, "_prepare_for_training"):
        raise UserError("resuming with another number of ranks, ZeRO stage or offload needs transformers 5.23 or later")
    return True


def restore_resharded(update: Update, checkpoint: Path) -> None:
    """Restore a mask in force from a checkpoint with another sharding. A collective."""
    update.restore(load_selected_state(checkpoint / SELECTED_NAME, update.mask))


@contextmanager
def without_rotation(arguments: TrainingArguments) -> Iterator[None]:
    """Keep older checkpoints inside, whatever --save_total_limit says."""
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        yield
    finally:
        arguments.save_total_limit = limit


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of the disk, which torch reports as RuntimeError, into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from error
    except RuntimeError as error:
        # Other RuntimeErrors are no disk's.
        if not any(writer in str(error) for writer in ("PytorchStreamWriter", "inline_container")):
            raise
        raise not_written(folder, error) from error


def _shown(sharding: dict[str, Any]) -> str:
    return f"{sharding.get('world_size')} ranks and {json.dumps(sharding.get('zero'))}"
