"""Wall time and peak memory of a run's phases.

Times add up where work happens, and are read where they are reported.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


def reset_peaks() -> bool:
    """Reset the memory peaks; return whether the host's peak can be read (only on Linux)."""
    # The allocator keeps the accelerator's peak, the kernel the host's.
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Return the most bytes of tensors on the accelerator since reset_peaks(); None on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def host_peak_bytes() -> int | None:
    """Return the most resident bytes of this process since reset_peaks(); None if /proc does not say."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


_seconds: dict[str, float] = {}


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Add the wall time inside to a phase's seconds. It also works as a decorator."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _seconds[phase] = _seconds.get(phase, 0.0) + time.perf_counter() - begin


def take_seconds(phase: str) -> float:
    """Return a phase's seconds since the last call, and start again at 0."""
    return _seconds.pop(phase, 0.0)
