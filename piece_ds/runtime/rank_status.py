"""Where every rank is, kept in the group's store, so that a rank that waits in vain can say for whom and where.

Ranks write at points that all of them pass, one small message each. It is read only once a collective has failed.
"""

import json
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from piece_ds.runtime.distributed import is_distributed, rank, world_size

_PREFIX = "piece_ds/where/"

# Ranks whose collectives run into the timeout do so within this time of each other.
GRACE_SECONDS = 3.0

# What torch's backends say where another rank does not come, and where it has gone.
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
    """Note that this rank has come to a place, in words; no collective. Cost: one message to the store."""
    _Own.count, _Own.place = _Own.count + 1, place
    _write("at")


def is_late(error: BaseException) -> bool:
    """Return whether a collective ended because a rank did not come in time."""
    return _is_of_group(error) and any(text in str(error).lower() for text in _LATE)


def is_gone(error: BaseException) -> bool:
    """Return whether a collective ended because a rank's process has ended."""
    return _is_of_group(error) and any(text in str(error).lower() for text in _GONE)


def missing_ranks() -> str:
    """After a collective has run into its timeout: the ranks that it waited for, and where they were last seen.

    Every rank that waited calls it within GRACE_SECONDS; those that have not by then are missing.
    """
    _write("waits")
    time.sleep(GRACE_SECONDS)
    seen = {other: _read(other) for other in range(world_size())}
    missing = {other: found for other, found in seen.items() if found is None or found["state"] != "waits"}
    if not missing:  # each waits for another: they are not at the same place
        fewest = min(found["count"] for found in seen.values() if found is not None)
        missing = {other: found for other, found in seen.items() if found is not None and found["count"] == fewest}
    shown = "; ".join(f"rank {other} was last seen at {_shown(found)}" for other, found in missing.items())
    return f"rank {rank()} has waited in vain at {_Own.place}: {shown}"


def claim(what: str) -> int:
    """1 for the first rank that claims this, 2 for the next ...; 1 without a store."""
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
        with suppress(RuntimeError):  # the store has gone with the rank that held it: the next collective will say so
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
    """Return the store that the default group was made with; None in one process."""
    if not is_distributed() or world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _is_of_group(error: BaseException) -> bool:
    """gloo's errors are plain RuntimeErrors that name one of its source files."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))
