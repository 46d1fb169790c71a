"""Describe the output folder of a run: its paths, and what is removed during the run. For its owner see claim.py."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.checkpoint.manifest import SUMS_NAME, is_complete
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import remove_temporaries

PREVIOUS_NAME = "previous.safetensors"
# The base model's logits, for --general_kl and --kl_tokens, until the stream ends.
LOGITS_FOLDER = "general_logits"
PARTIAL_NAME = "statistics.partial"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]{{1,18}}")


def checkpoints_in(task: Path) -> list[Path]:
    """Return the folders of a task that are named as the trainer names its checkpoints. Others are the user's own."""
    found = task.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def clear_half_written(root: Path) -> None:
    """Remove incomplete files and checkpoints of an interrupted run, before anything is written again. A collective."""
    if is_main():
        # Files are written as temporaries and renamed, so what is left over is half-written.
        remove_temporaries(root)
        for task in root.glob("[0-9]*-*"):
            for checkpoint in checkpoints_in(task):
                if not is_complete(checkpoint):
                    shutil.rmtree(checkpoint)
    barrier()


def forget_resumption(task: Path) -> None:
    """Remove what only an unfinished task needs. Only rank 0 calls it; it may be called again."""
    (task / PREVIOUS_NAME).unlink(missing_ok=True)
    shutil.rmtree(task / PARTIAL_NAME, ignore_errors=True)
    for checkpoint in checkpoints_in(task):
        (checkpoint / SUMS_NAME).unlink(missing_ok=True)  # first: half a checkpoint must not count as one
        shutil.rmtree(checkpoint)


_KINDS = {"mask.safetensors": "mask_bytes", "delta.safetensors": "delta_bytes", "model": "model_bytes"}
_NOT_COUNTED = {"previous.safetensors", "metrics.jsonl"}  # removed when the task is finished; a log


@dataclass(frozen=True)
class RunFolder:
    """Paths under --output_dir."""

    root: Path

    @property
    def run_file(self) -> Path:
        """The run's configuration."""
        return self.root / "run.json"

    @property
    def results_file(self) -> Path:
        """The run's results so far."""
        return self.root / "results.json"

    def task(self, index: int, name: str) -> Path:
        """Return NN-task, the folder of everything that one task leaves behind."""
        return self.root / f"{index:02d}-{name}"

    def model(self, index: int, name: str) -> Path:
        """Return the folder of a task's trained model."""
        return self.task(index, name) / "model"

    def predictions(self, moment: str) -> Path:
        """Return the folder of what the model generated at a moment: "before", or the name of a task's folder."""
        return self.root / "predictions" / moment

    def require_free(self, resume: bool, overwrite: bool = False) -> None:
        """Raise UserError, on all ranks, if the folder holds a run and neither resume nor overwrite is asked."""
        if broadcast_object(self.run_file.exists() and not (resume or overwrite)):
            raise UserError(self.taken())

    def taken(self) -> str:
        """Return the message about a folder that holds a run."""
        return (
            f"--output_dir {self.root} holds a run already: add --resume_from_checkpoint True or "
            "--overwrite_output_dir True, or use another folder"
        )


def written_bytes(task_folder: Path) -> dict[str, int]:
    """Return the bytes that a finished task left in its folder, by kind, without the trainer's checkpoints."""
    files = [path for path in task_folder.rglob("*") if path.is_file()]
    found: dict[str, int] = {}
    for path in files:
        # By the first part of the path: the model's folder counts as a whole.
        top = path.relative_to(task_folder).parts[0]
        if not top.startswith("checkpoint-") and top not in _NOT_COUNTED:
            kind = _KINDS.get(top, "other_bytes")
            found[kind] = found.get(kind, 0) + path.stat().st_size
    return found
