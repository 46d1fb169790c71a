"""Where the links of a chain lie: NN-task/chain/link-000000.safetensors, -000001 and so on. See chain.py."""

import re
from collections.abc import Iterable
from pathlib import Path

CHAIN_NAME = "chain"
_LINK = re.compile(r"link-([0-9]{6,9})\.safetensors")


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
    return sorted_by_task(source.glob(f"*/{CHAIN_NAME}")) or [source]


def sorted_by_task(found: Iterable[Path]) -> list[Path]:
    """Return what lies in folders of tasks, NN-name, in the order of NN. What lies in other folders is left out."""
    numbers = [(path.parent.name.partition("-")[0], path) for path in found]
    # By number, as text would put 10 before 9. isdigit() would let superscripts through, which int() cannot read.
    return [path for _, path in sorted((int(text), path) for text, path in numbers if text.isdecimal())]
