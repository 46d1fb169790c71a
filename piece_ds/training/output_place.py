"""Find what stands where a run would write its own files."""

import os
from pathlib import Path

# What a run writes: folders, and files.
_FOLDERS = ("predictions", "figures", "general_statistics")
_FILES = ("results.json", "report.html")


def why_blocked(root: Path) -> str | None:
    """Return what stands in the place of a run's own files, to be read after root's name; None if nothing does."""
    for name in _FOLDERS:
        if os.path.lexists(root / name) and not (root / name).is_dir():
            return f"holds a file {name}, where a run makes a folder"
    for name in _FILES:
        if os.path.lexists(root / name) and not (root / name).is_file():
            return f"holds {name}, which is no file"
    return None
