"""Where the links of a chain lie: NN-task/chain/link-000000.safetensors, -000001 and so on. See chain.py."""

import re
from pathlib import Path

CHAIN_NAME = "chain"
_LINK = re.compile(r"link-(\d{6,9})\.safetensors")


def link_file(folder: Path, number: int) -> Path:
    """Return where a link of a chain's folder is written."""
    return folder / f"link-{number:06d}.safetensors"


def link_files(folder: Path) -> list[Path]:
    """Return the links in one folder of a chain, in order. Files that are being written are not among them."""
    found = [(int(match[1]), path) for path in folder.glob("link-*") if (match := _LINK.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def chain_folders(source: Path) -> list[Path]:
    """Return the folders of links that a path names: itself, a task's, or those of a run's tasks in order."""
    if (source / CHAIN_NAME).is_dir():
        return [source / CHAIN_NAME]
    tasks = [path.parent for path in source.glob(f"*/{CHAIN_NAME}") if path.parent.name.partition("-")[0].isdigit()]
    if tasks:
        return [task / CHAIN_NAME for task in sorted(tasks, key=lambda task: int(task.name.partition("-")[0]))]
    return [source]
