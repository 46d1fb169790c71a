"""Claim an output folder for a run once its first step can be taken, and give it back if that never happens.

Nothing is written before. So a start that fails leaves the folder as it was, and the corrected command runs in it. It
may fail because a model cannot be read, an engine cannot be made, or a reporter cannot be reached.

A run holds the lock of its folder. A second one, which would resume or overwrite it meanwhile, is refused.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.folder_lock import FolderLock, is_free
from piece_ds.runtime.places import why_no_folder, why_unwritable
from piece_ds.runtime.schema import read_json
from piece_ds.runtime.signals import Preempted
from piece_ds.runtime.versions import versions
from piece_ds.training.output_place import why_blocked
from piece_ds.training.run_folder import LOGITS_FOLDER, PARTIAL_NAME, RunFolder

# Settings that may differ between the two halves of a resumed run.
_FREE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "save_total_limit",
    "save_steps",
    "save_strategy",
    "save_full",
    "delta_every",
    "delta_coding",
    "statistics_save_steps",
    "recipe",  # its flags are compared by themselves
    "deepspeed",
    "local_rank",
    "run_name",
    "nonfinite",
    "tokenized_cache",
}

_TAKEN = "another run is at work in --output_dir {root}: wait until it has ended, end it, or use another folder"


@dataclass
class Claim:
    """A run's claim on its folder. All ranks make the same one and make the same calls.

    Attributes:
        folder: the run's folder.
        configuration: what decides the results; compared with what the folder was made with.
        resume: continue the run that is there.
        overwrite: remove the run that is there.
        also: written beside the configuration and not compared.
        is_begun: the first step can be taken. From then on the folder is never given back.
    """

    folder: RunFolder
    configuration: dict[str, Any]
    resume: bool = False
    overwrite: bool = False
    also: dict[str, Any] = field(default_factory=dict)
    is_begun: bool = False
    _is_made: bool = False
    _is_new: bool = False
    _lock: FolderLock = field(init=False)

    def __post_init__(self) -> None:
        self._lock = FolderLock(self.folder.root)

    def check(self) -> None:
        """Raise UserError, on all ranks, if the folder cannot be claimed. Writes nothing. A collective.

        Raises:
            UserError: the folder belongs to another run, or to a finished or interrupted one while neither resume nor
                overwrite is asked; or nothing can be written there.
        """
        problem = broadcast_object((self._problem()) if is_main() else None)
        if problem:
            raise UserError(str(problem))

    def make(self) -> None:
        """Make the folder this run's own; a second call does nothing. A collective.

        Raises:
            UserError: as check(), since another run may have come first.
        """
        if self._is_made:
            return

        # Checked again, alone in the folder: time has passed since preflight.
        self._be_alone(make_folder=True)
        self.check()
        self._is_new = bool(broadcast_object(self.overwrite or not self.folder.run_file.exists()))
        if is_main() and self._is_new:
            if self.overwrite:
                remove_run(self.folder.root)
            write_json(self.folder.run_file, {**self.configuration, "versions": versions(), **self.also})
        self._is_made = True
        barrier()

    @contextmanager
    def given_back_unless_begun(self) -> Iterator[None]:
        """Restore the folder if what is inside fails before is_begun, so that the corrected command can run in it.

        Two things are kept, to be resumed from: the folder after a signal, and the sums of an unfinished statistics
        pass if the failure is the machine's and not the input's.
        """
        was_there = self.folder.root.exists()
        try:
            self._be_alone(make_folder=False)
            yield
        except Preempted:
            raise
        except Exception as error:
            is_resumable = not isinstance(error, UserError) and any(self.folder.root.glob(f"*/{PARTIAL_NAME}/*"))
            if is_main() and not self.is_begun and not is_resumable:
                self._give_back(was_there)
            raise
        finally:
            self._lock.release()

    def _be_alone(self, make_folder: bool) -> None:
        """Take the lock of the folder on rank 0, or raise UserError on all ranks. A collective."""
        problem = None
        if is_main():
            if make_folder:
                with suppress(OSError):  # check() says why
                    self.folder.root.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                problem = _TAKEN.format(root=self.folder.root)
        problem = broadcast_object(problem)
        if problem:
            raise UserError(str(problem))

    def _give_back(self, was_there: bool) -> None:
        if not self._lock.take(wait_seconds=0):
            return  # what is there is another run's
        with suppress(OSError):
            if self._is_new:
                remove_run(self.folder.root)
            for task in self.folder.root.glob("[0-9][0-9]-*"):  # transformers makes the folder of a trainer at once
                with suppress(OSError):
                    task.rmdir()
            if not was_there:
                self.folder.root.rmdir()

    def _problem(self) -> str | None:
        """Return why the folder is not this run's to take, or None."""
        root, run_file = self.folder.root, self.folder.run_file
        reason = why_no_folder(root) or why_unwritable(root)
        if reason is not None:
            return f"--output_dir {str(root)[:200]} {reason}: use another folder"

        # Another run may be at work there.
        if not self._lock.is_held and not is_free(root):
            return _TAKEN.format(root=root)

        # No run's folder, but it may hold files that a run would overwrite.
        if not run_file.exists():
            tasks = (path for path in root.glob("[0-9][0-9]-*") if not path.is_dir() or any(path.iterdir()))
            foreign = next((path.name for path in tasks), None) if root.exists() else None
            if foreign or self.folder.results_file.exists():
                return f"--output_dir {root} holds {foreign or 'results.json'} but no run.json: use another folder"
            blocked = why_blocked(root)
            return f"--output_dir {root} {blocked}: use another folder" if blocked else None
        if self.overwrite:
            return None

        # A run's folder: this one's, or another's.
        try:
            earlier = read_json(run_file, dict[str, Any], "run's configuration", "use another --output_dir")
        except UserError as error:
            return str(error)
        difference = _first_difference(earlier, json.loads(json.dumps(self.configuration)))
        if difference:
            return (
                f"--output_dir {root} belongs to another run ({difference}): use another folder, "
                "the settings it was begun with, or --overwrite_output_dir True"
            )
        return None if self.resume else self.folder.taken()


def remove_run(root: Path) -> None:
    """Remove what a run writes in its folder. Other files stay. Rank 0 calls it.

    run.json comes last, so that a removal that is killed still leaves a run's folder.
    """
    for name in (
        "[0-9][0-9]-*",
        "predictions",
        "general_statistics",
        LOGITS_FOLDER,
        "figures",
        "results.json",
        "report.html",
        "run.json",
    ):
        for path in root.glob(name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _first_difference(earlier: dict[str, Any], now: dict[str, Any], path: str = "") -> str | None:
    """Return 'key was X, is Y' for the first setting that differs, or None."""
    # Only what this run decides counts: the folder may know settings that no longer exist.
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
