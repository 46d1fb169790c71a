"""What this process used, for one run among many: Linux counts both."""

import re
from pathlib import Path


def zero_peak_memory() -> None:
    """Let the highest resident size be counted anew, from what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Highest resident size since zero_peak_memory()."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def written_bytes() -> int:
    """Bytes that this process has given to write calls."""
    found = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found.group(1))
