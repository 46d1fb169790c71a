"""What an interrupted run leaves behind, and what a finished task does not need any more."""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.checkpoint.seal import SUMS_NAME, is_sealed
from piece_ds.distributed import barrier, is_main
from piece_ds.files import remove_temporaries

PREVIOUS_NAME = "previous.safetensors"
PARTIAL_NAME = "statistics.partial"


def clear_half_written(root: Path) -> None:
    """Remove what was being written when the run was interrupted, before anything is written again. A collective."""
    if is_main():
        remove_temporaries(root)
        for checkpoint in root.glob(f"[0-9]*-*/{PREFIX_CHECKPOINT_DIR}-*"):
            if not is_sealed(checkpoint):
                shutil.rmtree(checkpoint)
    barrier()


def forget_resumption(task: Path) -> None:
    """A finished task needs nothing to go on from. Rank 0 alone calls it; it may be called again."""
    (task / PREVIOUS_NAME).unlink(missing_ok=True)
    shutil.rmtree(task / PARTIAL_NAME, ignore_errors=True)
    for checkpoint in task.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        (checkpoint / SUMS_NAME).unlink(missing_ok=True)  # first: half a checkpoint must not count as one
        shutil.rmtree(checkpoint)
