"""Apply verified deltas to a model folder: into a copy, or in place, file by file.

Only the bytes of selected elements are written. Headers, the order of tensors and all other files stay as they are. So
reverting restores the very same file, by sha256.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from piece_ds.deltas.delta import Delta
from piece_ds.deltas.folder import ModelFolder, map_bits
from piece_ds.deltas.guarded import locked, replace_file, require_changeable, require_own_files
from piece_ds.deltas.record import RECORD_NAME, Record, Unfinished, read_record, write_record
from piece_ds.deltas.verify import Step, check_result, file_fingerprint, verify
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import not_written


def patch_to(folder: ModelFolder, steps: Sequence[Step], output: Path | str, with_record: bool = True) -> None:
    """Write a copy of the folder with steps applied. It appears under its name whole, or not at all.

    Args:
        folder: the model.
        steps: deltas to apply or revert, in order.
        output: a path where nothing exists yet.
        with_record: keep piece_ds.json, so that the deltas can be listed and reverted. Otherwise the copy is a plain
            folder.
    Raises:
        UserError: see verify(). Also if output exists, or an earlier change in place was interrupted.
    """

    # Check everything before a byte is written.
    output = Path(output)
    require_free(output)
    require_own_files(folder.root)
    begun, record = read_record(folder.root), _next_record(folder, steps)
    verify(folder, steps)

    # Build the copy under a temporary name.
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(folder.root, temporary)
        for file in folder.files:
            _patch_file(folder, steps, file, temporary / file)
        if with_record:
            write_record(temporary, record)
        else:
            (temporary / RECORD_NAME).unlink(missing_ok=True)
        # The copy may have taken time: nothing may have changed under it.
        if read_record(folder.root) != begun:
            raise UserError(f"{folder.root} was changed by another command while it was copied: run this one again")
        _rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, output: Path) -> None:
    """Give the finished copy its name, unless another command was there first."""
    try:
        os.rename(temporary, output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise not_written(output, error) from error
        raise UserError(f"--output {output} appeared while this command ran: give a path where nothing is") from None


def require_free(output: Path) -> None:
    """Raise UserError if something exists at output, or nothing can be written there."""
    try:
        # A dangling link does not exist, but its name is taken.
        taken = output.exists() or output.is_symlink()
        if not taken:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # names that are too long, or hold a zero byte; a parent that is a file
        raise UserError(f"--output {str(output)[:200]!r} cannot be written ({error.__class__.__name__})") from None
    if taken:
        raise UserError(f"--output {output} exists already: give a path where nothing is, or remove it")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: its folder cannot be written; give another path")


def patch_in_place(folder: ModelFolder, steps: Sequence[Step]) -> None:
    """Apply steps to the folder itself, one file after another. Each file is replaced whole.

    piece_ds.json first notes what is going to happen. An interruption leaves some files changed, some not, and that
    note. The same call then finishes the work. Every other change of the folder is refused until then.

    Raises:
        UserError: see verify(). Also if another change was interrupted or is running, or a file belongs to another user
            or is in neither the old nor the new state.
    Disk: room for one more copy of the largest file.
    """
    require_own_files(folder.root)
    with locked(folder.root):
        note, is_continued = _begin(folder, steps)
        for file in folder.files:
            # The file itself tells whether it was done: the note says only what was planned.
            found = file_fingerprint(folder, file)
            before, after = note.files.get(file, (found, found))
            if found == after:
                continue  # it does not change, or was done before the interruption
            if found != before:
                raise UserError(
                    f"{folder.root / file} is neither as before nor as after the interrupted change: copy the folder "
                    "again"
                )
            replace_file(folder.root / file, partial(_patch_file, folder, steps, file))
        # Nothing of this run has verified the weights that an earlier call found.
        if is_continued:
            check_result(folder, steps)
        write_record(folder.root, Record(note.applied))


def _begin(folder: ModelFolder, steps: Sequence[Step]) -> tuple[Unfinished, bool]:
    """Note what is going to happen, or find the note of an interrupted call.

    Returns:
        The note, and whether an interrupted call wrote it, which this call continues.
    Raises:
        UserError: another change was interrupted, or the steps do not fit the folder.
    """
    record = read_record(folder.root)
    applied = record.after(*_split(steps), folder.root).applied
    # The same steps on the same delta files: then the note is of this very call.
    what = tuple((step.verb, step.delta.metadata.get("checksum")) for step in steps)
    for file in folder.files:
        require_changeable(folder.root / file)
    if record.unfinished is not None:
        if record.unfinished.steps != what:
            raise _interrupted(folder.root)
        _check_note(folder, record.unfinished)
        return replace(record.unfinished, applied=applied), True
    note = Unfinished(what, applied, verify(folder, steps).files)
    # The note is on disk before the first byte of the model changes.
    write_record(folder.root, replace(record, unfinished=note))
    return note, False


def _check_note(folder: ModelFolder, note: Unfinished) -> None:
    """Raise UserError if a note, which anybody may have written, names what is no file of the model."""
    foreign = next((file for file in note.files if file not in folder.files), None)
    if foreign is not None:
        raise UserError(
            f"{folder.root / RECORD_NAME} notes an unfinished change of {foreign[:200]!r}, which is no file of this "
            "model: the note is not piece_ds's; copy the folder again"
        )


def _next_record(folder: ModelFolder, steps: Sequence[Step]) -> Record:
    record = read_record(folder.root)
    if record.unfinished is not None:
        raise _interrupted(folder.root)
    return record.after(*_split(steps), folder.root)


def _split(steps: Sequence[Step]) -> tuple[list[Delta], list[Delta]]:
    """Return (deltas to apply, deltas to revert)."""
    return [step.delta for step in steps if not step.undo], [step.delta for step in steps if step.undo]


def _interrupted(root: Path) -> UserError:
    return UserError(f"{root}: an earlier change in place was interrupted: run the same command again to finish it")


def _patch_file(folder: ModelFolder, steps: Sequence[Step], file: str, path: Path) -> None:
    """Write the steps' values into a copy of one file of the folder, and flush it to the disk."""
    for name in folder.in_file(file):
        parameter = folder.parameter_of[name]
        todo = [step for step in steps if parameter in step.delta.shapes]
        if todo:
            flat = map_bits(path, folder.stored[name], "r+")
            for step in todo:
                positions, _, _, new = step.bits_in(folder, name)
                flat[positions] = new
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
