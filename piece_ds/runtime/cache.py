"""The user's cache folder, and a lock for what several processes may want to put there at once."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from piece_ds.runtime.errors import MachineError, UserError

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class CacheRefused(UserError):
    """The cache folder is one that this user cannot write: another one must be named."""


def cache_folder() -> Path:
    """Return the folder for what is fetched or costly to compute. It is not made here.

    It is PIECE_DS_CACHE if that is set, else piece_ds in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).
    """
    own = os.environ.get("PIECE_DS_CACHE")
    return _with_home(own) if own else user_cache() / "piece_ds"


def user_cache() -> Path:
    """Return the user's cache folder: XDG_CACHE_HOME, else ~/.cache. Raise UserError if this user has no home."""
    return _with_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def _with_home(folder: str) -> Path:
    found = os.path.expanduser(folder)
    if found.startswith("~"):  # a container's user without a name, or an unknown one
        raise UserError(
            f"{folder} cannot be found, since that user has no home: set HOME, or PIECE_DS_CACHE to a folder"
        )
    return Path(found)


def made(folder: Path) -> Path:
    """Return a folder of the cache, made if it is not there.

    Raises:
        CacheRefused: it is no folder, or this user cannot write there.
        MachineError: the disk is full or broken.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def _cannot_write(folder: Path, error: OSError) -> UserError | MachineError:
    kind = MachineError if error.errno in _FULL_OR_BROKEN else CacheRefused
    return kind(f"the cache folder {folder} cannot be written ({error}): name another one with PIECE_DS_CACHE")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of path inside: no other process that sees the file system has it.

    The system frees the lock when a process ends, however it ends. It needs no process group, so it also works for
    ranks that have not met yet. The lock is a file beside path, which stays.

    Raises:
        CacheRefused: the folder is none, or cannot be written by this user.
        MachineError: the disk is full or broken, or its file system has no locks.
    """
    lock = made(path.parent) / f"{path.name}.lock"
    try:
        handle = open(lock, "a")  # noqa: SIM115
    except OSError as error:
        raise _cannot_write(lock.parent, error) from error
    # Closing the file frees the lock.
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise MachineError(
                f"the cache folder {lock.parent} cannot be locked ({error}): name another one with PIECE_DS_CACHE"
            ) from error
        yield
