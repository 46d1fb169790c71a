"""The output folder of a run: what lies where, whose it is, and how far it has come."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piece_ds.checkpoint.manifest import SUMS_NAME, is_complete
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import remove_temporaries, write_json
from piece_ds.runtime.schema import read_json
from piece_ds.runtime.versions import versions

PREVIOUS_NAME = "previous.safetensors"
PARTIAL_NAME = "statistics.partial"


def clear_half_written(root: Path) -> None:
    """Remove what was being written when the run was interrupted, before anything is written again. A collective."""
    if is_main():
        remove_temporaries(root)
        for checkpoint in root.glob(f"[0-9]*-*/{PREFIX_CHECKPOINT_DIR}-*"):
            if not is_complete(checkpoint):
                shutil.rmtree(checkpoint)
    barrier()


def forget_resumption(task: Path) -> None:
    """A finished task needs nothing to go on from. Rank 0 alone calls it; it may be called again."""
    (task / PREVIOUS_NAME).unlink(missing_ok=True)
    shutil.rmtree(task / PARTIAL_NAME, ignore_errors=True)
    for checkpoint in task.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        (checkpoint / SUMS_NAME).unlink(missing_ok=True)  # first: half a checkpoint must not count as one
        shutil.rmtree(checkpoint)


# Settings that may differ between the two halves of a resumed run.
_FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "save_total_limit",
    "save_steps",
    "save_strategy",
    "save_full",
    "statistics_save_steps",
    "deepspeed",
    "local_rank",
    "run_name",
    "nonfinite",
}

_KINDS = {"mask.safetensors": "mask_bytes", "delta.safetensors": "delta_bytes", "model": "model_bytes"}
_NOT_COUNTED = {"previous.safetensors", "metrics.jsonl"}  # removed when the task is finished; a log


@dataclass(frozen=True)
class RunFolder:
    """Paths under --output_dir."""

    root: Path

    @property
    def run_file(self) -> Path:
        return self.root / "run.json"

    @property
    def results_file(self) -> Path:
        return self.root / "results.json"

    def task(self, index: int, name: str) -> Path:
        """NN-task: everything that one task leaves behind."""
        return self.root / f"{index:02d}-{name}"

    def model(self, index: int, name: str) -> Path:
        return self.task(index, name) / "model"

    def predictions(self, moment: str) -> Path:
        """Where what the model wrote at a moment of the stream lies: "before", or the name of a task's folder."""
        return self.root / "predictions" / moment

    def require_free(self, resume: bool) -> None:
        """Raise UserError, on all ranks, where the folder holds a run and resume is not asked."""
        if broadcast_object(self.run_file.exists() and not resume):
            raise UserError(self._taken())

    def _taken(self) -> str:
        return f"--output_dir {self.root} holds a run already: add --resume_from_checkpoint True, or use another folder"

    def claim(self, configuration: dict[str, Any], resume: bool, also: dict[str, Any] | None = None) -> None:
        """Make the folder this run's own, on all ranks.

        Args:
            configuration: what decides the results; compared with what the folder was made with.
            resume: continue what is there.
            also: written beside it and not compared.
        Raises:
            UserError: the folder belongs to another run, or to a finished or interrupted one and resume is not asked;
                or nothing can be written there.
        """
        problem = broadcast_object(self._problem(configuration, resume) or self._unwritable() if is_main() else None)
        if problem:
            raise UserError(str(problem))
        if is_main() and not self.run_file.exists():
            write_json(self.run_file, {**configuration, "versions": versions(), **(also or {})})
        barrier()

    def _unwritable(self) -> str | None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"piece_ds")
        except OSError as error:
            return f"--output_dir {self.root} cannot be written ({error.strerror}): use another folder"
        return None

    def _problem(self, configuration: dict[str, Any], resume: bool) -> str | None:
        if self.root.exists() and not self.root.is_dir():
            return f"--output_dir {self.root} is a file, expected a folder"
        if not self.run_file.exists():
            foreign = next((p.name for p in self.root.glob("[0-9][0-9]-*")), None) if self.root.exists() else None
            if foreign or self.results_file.exists():
                return f"--output_dir {self.root} holds {foreign or 'results.json'} but no run.json: use another folder"
            return None
        try:
            earlier = read_json(self.run_file, dict[str, Any], "run's configuration", "use another --output_dir")
        except UserError as error:
            return str(error)
        difference = _first_difference(earlier, json.loads(json.dumps(configuration)))
        if difference:
            return (
                f"--output_dir {self.root} belongs to another run ({difference}): use another folder, "
                "or the settings it was begun with"
            )
        if not resume:
            return self._taken()
        return None


def written_bytes(task_folder: Path) -> dict[str, int]:
    """Bytes that a finished task left in its folder, by what they are; without the trainer's checkpoints."""
    files = [path for path in task_folder.rglob("*") if path.is_file()]
    found: dict[str, int] = {}
    for path in files:
        top = path.relative_to(task_folder).parts[0]
        if not top.startswith("checkpoint-") and top not in _NOT_COUNTED:
            kind = _KINDS.get(top, "other_bytes")
            found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def _first_difference(earlier: dict[str, Any], now: dict[str, Any], path: str = "") -> str | None:
    """'key was X, is Y' for the first setting that differs, or None."""
    for key in now:
        if key in _FREE:
            continue
        if isinstance(now[key], dict) and isinstance(earlier.get(key), dict):
            found = _first_difference(earlier[key], now[key], f"{path}{key}.")
            if found:
                return found
        elif earlier.get(key) != now[key]:
            return f"{path}{key} was {earlier.get(key)!r:.80}, is {now[key]!r:.80}"
    return None
