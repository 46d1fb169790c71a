"""The lock file under which torch compiles an extension: waited for with a word and a limit, never for ever.

torch makes FOLDER/lock, compiles, and removes it. A killed process leaves it behind, and every later one waits for its
removal in silence, also if the extension is compiled already. DeepSpeed's optimizers are such extensions.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"

# A lock that nobody here holds is given up after this time without a new file beside it. Another machine may hold it,
# or a container that this one does not see: a compiler takes some minutes for DeepSpeed's largest file.
ABANDONED_SECONDS = 300.0
# The same, if a process of this machine holds it: that one may be stopped, or hang itself.
HELD_SECONDS = 3600.0

_PAUSE_SECONDS = 0.1  # torch's own
_LOOK_SECONDS = 5.0  # between looks at who holds a lock; the first one is at once


def wait_with_a_limit() -> None:
    """Let this process wait for another one's compilation only as long as there is hope. It may be called again.

    torch.utils.cpp_extension, which DeepSpeed calls, then raises a UserError that names the lock.
    """
    from torch.utils import file_baton

    def wait(baton: Any) -> None:
        wait_for(Path(baton.lock_file_path))

    file_baton.FileBaton.wait = wait


def wait_for(lock: Path) -> None:
    """Wait until a lock is gone. Say what is waited for after some seconds.

    Raises:
        UserError: it seems to be left behind by a process that was killed.
    """
    looks, next_look = 0, time.monotonic()
    while lock.exists():
        if time.monotonic() >= next_look:
            reason = why_abandoned(lock)
            if reason is not None:
                raise UserError(f"{lock} {reason}: remove it, then start again")
            # Most compilations that are waited for end between the first look and the second.
            if looks == 1:
                who = "another process" if is_held(lock) else "a process that this machine does not see, if any,"
                logger.warning(
                    "waiting for %s to compile %s; if none does, end this run and remove %s",
                    who,
                    lock.parent.name,
                    lock,
                )
            looks, next_look = looks + 1, next_look + _LOOK_SECONDS
        time.sleep(_PAUSE_SECONDS)


def abandoned_locks(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield every lock below torch's folder of extensions that seems to be left behind, and why."""
    for pattern in (f"*/{LOCK_NAME}", f"*/*/{LOCK_NAME}"):
        for lock in sorted(root.glob(pattern)):
            reason = why_abandoned(lock)
            if reason is not None:
                yield lock, reason


def why_abandoned(lock: Path) -> str | None:
    """Return why nobody seems to compile under a lock any more, to be read after its name; None if somebody may."""
    try:
        newest = max(entry.stat().st_mtime for entry in (lock, *lock.parent.iterdir()))
    except OSError:  # it is gone, or going
        return None
    silent = time.time() - newest
    if silent < ABANDONED_SECONDS:
        return None
    held = is_held(lock)
    if held and silent < HELD_SECONDS:
        return None
    whose = "is held by a process that has" if held else "is held by no process of this machine, and nobody has"
    return f"{whose} compiled anything beside it for {silent / 60:.0f} minutes"


def is_held(lock: Path) -> bool:
    """Return whether a process of this machine has a file open. Processes of other users are not seen.

    Cost: a look at every open file of this user, some milliseconds.
    """
    try:
        wanted = lock.stat()
        processes = [entry for entry in os.scandir("/proc") if entry.name.isdecimal()]
    except OSError:
        return False
    for process in processes:
        try:
            files = list(os.scandir(f"{process.path}/fd"))
        except OSError:  # ended meanwhile, or another user's
            continue
        for file in files:
            try:
                found = os.stat(file.path)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
