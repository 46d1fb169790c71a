"""Putting verified deltas on a model folder: into a copy, or in place, file by file.

Only the selected elements' bytes are written; headers, tensor order and all other files stay as they are, so that
reverting gives back the very file, by sha256.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from piece_ds.deltas.delta import Delta
from piece_ds.deltas.folder import ModelFolder, map_bits
from piece_ds.deltas.record import RECORD_NAME, Record, Unfinished, read_record, write_record
from piece_ds.deltas.verify import Step, file_fingerprint, verify
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_whole


def patch_to(folder: ModelFolder, steps: Sequence[Step], output: Path | str, with_record: bool = True) -> None:
    """Write a copy of the folder with steps taken. It appears whole, under its name, or not at all.

    Args:
        output: a path where nothing is yet.
        with_record: keep piece_ds.json, so that the deltas can be listed and reverted; else a plain folder.
    Raises:
        UserError: see verify(); output exists; the folder's last change in place was interrupted.
    """
    output = Path(output)
    require_free(output)
    record = _next_record(folder, steps)
    verify(folder, steps)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(folder.root, temporary)
        for file in folder.files:
            _patch_file(folder, steps, file, temporary / file)
        if with_record:
            write_record(temporary, record)
        else:
            (temporary / RECORD_NAME).unlink(missing_ok=True)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(output: Path) -> None:
    """Raise UserError where something stands at output."""
    if output.exists():
        raise UserError(f"--output {output} exists already: give a path where nothing is, or remove it")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)


def patch_in_place(folder: ModelFolder, steps: Sequence[Step]) -> None:
    """Take steps in the folder itself, one file after another, each replaced whole.

    piece_ds.json says first what is going to happen. An interruption leaves some files changed and some not, and that
    note; the same call finishes the work, and every other change of the folder is refused until then.

    Raises:
        UserError: see verify(); another change was interrupted; a file is neither as before nor as after.
    Disk: room for one more copy of the largest file.
    """
    note = _begin(folder, steps).unfinished
    assert note is not None
    for file, (before, after) in note.files.items():
        found = file_fingerprint(folder, file)
        if found == after:
            continue  # done before the interruption
        if found != before:
            raise UserError(
                f"{folder.root / file} is neither as before nor as after the interrupted change: copy the folder again"
            )
        write_whole(folder.root / file, partial(_write_patched, folder, steps, file))
    write_record(folder.root, Record(note.applied))


def _write_patched(folder: ModelFolder, steps: Sequence[Step], file: str, path: Path) -> None:
    shutil.copyfile(folder.root / file, path)
    _patch_file(folder, steps, file, path)


def _begin(folder: ModelFolder, steps: Sequence[Step]) -> Record:
    """The note of what is going to happen, made now or by the interrupted call that this one continues."""
    record = read_record(folder.root)
    applied = record.after(*_split(steps), folder.root).applied
    what = tuple((step.verb, step.delta.metadata.get("checksum")) for step in steps)
    if record.unfinished is not None:
        if record.unfinished.steps != what:
            raise _interrupted(folder.root)
        return record
    files = verify(folder, steps).files
    begun = replace(record, unfinished=Unfinished(what, applied, files))
    write_record(folder.root, begun)
    return begun


def _next_record(folder: ModelFolder, steps: Sequence[Step]) -> Record:
    record = read_record(folder.root)
    if record.unfinished is not None:
        raise _interrupted(folder.root)
    return record.after(*_split(steps), folder.root)


def _split(steps: Sequence[Step]) -> tuple[list[Delta], list[Delta]]:
    """(deltas to put on, deltas to take off)"""
    return [step.delta for step in steps if not step.undo], [step.delta for step in steps if step.undo]


def _interrupted(root: Path) -> UserError:
    return UserError(f"{root}: an earlier change in place was interrupted: run the same command again to finish it")


def _patch_file(folder: ModelFolder, steps: Sequence[Step], file: str, path: Path) -> None:
    """Write the steps' values into a copy of one file of the folder, and have them on disk."""
    for name in folder.in_file(file):
        parameter = folder.parameter_of[name]
        todo = [step for step in steps if parameter in step.delta.shapes]
        if todo:
            flat = map_bits(path, folder.stored[name], "r+")
            for step in todo:
                index, _, new = step.bits(parameter)
                flat[index] = new
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
