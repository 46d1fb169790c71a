"""Wall time of a run's phases, added up where they happen and taken where they are written down."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds: dict[str, float] = {}


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Add what happens inside to a phase's seconds; also a decorator."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _seconds[phase] = _seconds.get(phase, 0.0) + time.perf_counter() - begin


def take_seconds(phase: str) -> float:
    """A phase's seconds since they were last taken."""
    return _seconds.pop(phase, 0.0)
