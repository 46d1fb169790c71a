"""Write the rows of every benchmark: what was measured, and on which device, versions, commit and day."""

import csv
import os
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    """Return 'cpu-2-cores' or the GPU's name, in the form used in file names."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{os.cpu_count()}-cores"


def write_rows(path: Path, rows: list[dict[str, Any]], **versions: str) -> None:
    """Write one CSV line per row, with device, torch, further versions, commit and date at its end."""
    facts = {
        "device": device_name(),
        "torch": torch.__version__,
        **versions,
        "commit": commit_of(),
        "date": date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def commit_of() -> str:
    """Return PIECE_DS_COMMIT, by which machines without the repository are told it, else that of the working tree.

    It is empty without git or outside a repository.
    """
    if told := os.environ.get("PIECE_DS_COMMIT"):
        return told
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
