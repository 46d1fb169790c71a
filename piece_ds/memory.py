"""The most memory that this process has held since a moment: on the accelerator, and in the host's RAM."""

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak resident set size back to what is resident now


def reset_peaks() -> bool:
    """Begin anew; whether the host's peak can be told (on Linux alone)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Most bytes of tensors on the accelerator since reset_peaks(); None on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def host_peak_bytes() -> int | None:
    """Most resident bytes of this process since reset_peaks(); None where /proc does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
