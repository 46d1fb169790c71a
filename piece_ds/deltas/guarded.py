"""Guard a model folder: what may be read from it, who may change it, and one command at a time.

A folder from somebody else can hold links that lead out of it, pipes that nobody writes to, and a note of unfinished
work that names any path. None of these is followed. Reading stays in the folder, and files keep their owner and mode.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_whole

_LOCK_NAME = ".piece_ds.lock"


def require_own_files(root: Path) -> None:
    """Raise UserError if anything in a folder is a link out of it, a pipe, a socket or a device.

    The Hub's cache is the only exception: its snapshots are links into the folder of blobs beside them.
    """
    inside = [root.resolve()]
    if root.resolve().parent.name == "snapshots":
        inside.append(root.resolve().parent.parent / "blobs")
    for path in root.rglob("*"):
        if path.is_symlink():
            target = _target(path)
            if target is None or not any(target.is_relative_to(folder) for folder in inside):
                raise UserError(
                    f"{path} is a link to {os.readlink(path)[:200]!r}, outside of {root}: a copy would hold what it "
                    "points to; replace it by the file, or remove it"
                )
        elif not stat.S_ISREG(path.lstat().st_mode) and not path.is_dir():
            raise UserError(f"{path} is neither a file nor a folder, which a model folder has no use for: remove it")


def _target(link: Path) -> Path | None:
    """Return where a link leads; None if nothing is there."""
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError):  # nothing there, or a cycle of links
        return None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Lock the folder for one command that changes it, for as long as the block lasts.

    Raises:
        UserError: another command holds the lock, or nothing can be written there.
    """
    path = root / _LOCK_NAME
    try:
        # O_NOFOLLOW: a link by this name may lead anywhere.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{root} cannot be changed in place ({error.strerror}): use --output") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder removes the file. Then this lock is on a file that nobody else can find.
            is_held = os.path.samestat(os.fstat(handle), os.lstat(path))
        except OSError:
            is_held = False

        # Only one command goes on; it removes the lock file when it ends.
        if not is_held:
            raise UserError(f"another command is changing {root}: run this one again when it has ended")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)


def require_changeable(path: Path) -> None:
    """Raise UserError unless this process may replace a file and give the new one the same owner."""
    status = path.stat()
    is_root = os.geteuid() == 0
    groups = {os.getegid(), *os.getgroups()}
    if not is_root and (status.st_uid != os.geteuid() or status.st_gid not in groups):
        raise UserError(
            f"{path} belongs to user {status.st_uid}, group {status.st_gid}: changed in place it would belong to "
            f"{os.geteuid()}; run this as its owner, or use --output"
        )


def replace_file(path: Path, change: Callable[[Path], object]) -> None:
    """Replace a file by a changed copy, whole, with the same owner and mode.

    Args:
        path: of the file.
        change: called with the path of the copy. Until it is in place, only this user can read it.
    Raises:
        MachineError: the copy cannot be written; the file is unchanged.
    """
    before = path.stat()

    def write(temporary: Path) -> None:
        # Nobody else may read the copy while it is written, whatever the folder's mode.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        shutil.copyfile(path, temporary)
        change(temporary)
        # require_changeable() has checked that this process may do so.
        if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(temporary, before.st_uid, before.st_gid)
        os.chmod(temporary, stat.S_IMODE(before.st_mode))

    write_whole(path, write)
