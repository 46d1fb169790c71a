"""A lock on a folder itself: one process at a time works in it, and nothing is written for that."""

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

# A process that was killed may leave children behind for a moment, and they hold its lock until they end.
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.1


class FolderLock:
    """The lock of one folder, freed with this object at the latest, and by the system when the process ends."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is opened."""
        self._folder = folder
        self._free: weakref.finalize[[int], FolderLock] | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._free is not None

    def take(self, wait_seconds: float | None = None) -> bool:
        """Take the lock, and return whether no other process has it. A second call changes nothing.

        A folder that is not there, and a file system without locks of folders, count as free.

        Args:
            wait_seconds: how long to wait for another process; None means WAIT_SECONDS.
        """
        if self._free is not None:
            return True
        try:
            handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return True

        # Wait a little: see WAIT_SECONDS.
        end = time.monotonic() + (WAIT_SECONDS if wait_seconds is None else wait_seconds)
        while (is_free := _try_lock(handle)) is False and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        if is_free:
            self._free = weakref.finalize(self, os.close, handle)
        else:
            os.close(handle)
        return is_free is not False

    def release(self) -> None:
        """Free the lock, if this object holds it."""
        if self._free is not None:
            self._free()
            self._free = None


def is_free(folder: Path) -> bool:
    """Return whether no other process holds the lock of a folder."""
    lock = FolderLock(folder)
    try:
        return lock.take()
    finally:
        lock.release()


def _try_lock(handle: int) -> bool | None:
    """Return whether the lock is ours now; None if the file system has no such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
