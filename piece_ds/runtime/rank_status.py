"""Where every rank is, kept in the group's store. A rank that waits in vain can then say for whom, and where they were.

Ranks write one small message at points that all of them pass. It is read only after a collective has failed.
"""

import json
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from piece_ds.runtime.distributed import is_distributed, rank, world_size

_PREFIX = "piece_ds/where/"

# Ranks that wait in the same collective time out within this many seconds of each other.
GRACE_SECONDS = 3.0

# What torch's backends say if another rank does not come, and if it has gone.
_LATE = ("timed out waiting", "timeout", "timed out")
_GONE = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
)


class _Own:
    """What this process has written last."""

    count = 0
    place = "its start"


def report_status(place: str) -> None:
    """Note that this rank has reached a place, described in words. Not a collective. Cost: one message to the store."""
    _Own.count, _Own.place = _Own.count + 1, place
    _write("at")


def is_late(error: BaseException) -> bool:
    """Return whether a collective ended because a rank did not come in time."""
    return _is_of_group(error) and any(text in str(error).lower() for text in _LATE)


def is_gone(error: BaseException) -> bool:
    """Return whether a collective ended because a rank's process has ended."""
    return _is_of_group(error) and any(text in str(error).lower() for text in _GONE)


def missing_ranks() -> str:
    """Return which ranks a timed-out collective waited for, and where they were last seen.

    Every rank that waited calls this within GRACE_SECONDS. Ranks that have not done so by then are missing.
    """
    # Ranks that are not missing say that they wait.
    _write("waits")
    time.sleep(GRACE_SECONDS)
    seen = {other: _read(other) for other in range(world_size())}
    missing = {other: found for other, found in seen.items() if found is None or found["state"] != "waits"}
    if not missing:  # all of them wait, but at different places: the one furthest behind is at fault
        fewest = min(found["count"] for found in seen.values() if found is not None)
        missing = {other: found for other, found in seen.items() if found is not None and found["count"] == fewest}
    shown = "; ".join(f"rank {other} was last seen at {_shown(found)}" for other, found in missing.items())
    return f"rank {rank()} has waited in vain at {_Own.place}: {shown}"


def claim(what: str) -> int:
    """Return 1 for the first rank that claims `what`, 2 for the next, and so on; always 1 without a store."""
    store = _store()
    try:
        return int(store.add(f"{_PREFIX}{what}", 1)) if store is not None else 1
    except Exception:  # the store has gone with the rank that held it
        return 1


def _shown(found: dict[str, Any] | None) -> str:
    return "its start" if found is None else f"{found['place']}, {time.time() - found['time']:.0f} s ago"


def _write(state: str) -> None:
    store = _store()
    if store is not None:
        found = {"state": state, "count": _Own.count, "place": _Own.place, "time": time.time()}
        with suppress(RuntimeError):  # the store is gone with the rank that held it; the next collective says so
            store.set(f"{_PREFIX}{rank()}", json.dumps(found))


def _read(other: int) -> dict[str, Any] | None:
    store = _store()
    try:
        if store is None or not store.check([f"{_PREFIX}{other}"]):
            return None
        return json.loads(store.get(f"{_PREFIX}{other}"))
    except (RuntimeError, ValueError):
        return None


def _store() -> Any:
    """Return the store that the default group was made with; None in a single process."""
    if not is_distributed() or world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _is_of_group(error: BaseException) -> bool:
    """Return whether an error is of a collective. gloo raises plain RuntimeErrors that name one of its source files."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))
