"""General text: pieces of the sources of Python's standard library, which every installation carries.

The base model learns from most files. Pieces of the other files are the text that measures forgetting. The split is by
file, so the held-out pieces come from files that the model never saw.
"""

import sysconfig
from pathlib import Path
from random import Random

from piece_ds.demo.tasks import Row

# Third-party code, tests and data tables of the library: not like prose, or not in every installation.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}
MIN_FILE_BYTES = 2000
HELD_OUT_SHARE = 0.1


def source_files(root: Path | None = None) -> list[Path]:
    """Return Python sources under root in sorted order, without SKIPPED_FOLDERS.

    Args:
        root: None means the standard library.
    Raises:
        RuntimeError: fewer than 20 usable files: this installation carries no sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    paths = [path for path in paths if path.stat().st_size >= MIN_FILE_BYTES]
    if len(paths) < 20:
        raise RuntimeError(f"{root} has {len(paths)} Python sources, expected at least 20: install the full library")
    return paths


def split_files(paths: list[Path], random: Random) -> tuple[list[Path], list[Path]]:
    """Shuffle paths and split them into (learned, held out). paths itself is not modified."""
    shuffled = random.sample(paths, len(paths))
    num_held_out = max(1, int(len(shuffled) * HELD_OUT_SHARE))
    return shuffled[num_held_out:], shuffled[:num_held_out]


def draw_text_rows(paths: list[Path], num_rows: int, num_bytes: int, random: Random) -> list[Row]:
    """Return num_rows rows with an empty prompt and num_bytes of source text as the answer.

    A piece starts at the start of a line. It has only ASCII characters, so that bytes and characters agree.

    Args:
        paths: files to draw from, each with probability proportional to its size.
        num_rows: rows wanted.
        num_bytes: length of each piece.
        random: source of randomness; it is advanced.
    Returns:
        A list of num_rows rows; pieces may overlap.
    """
    texts = [path.read_bytes().decode("ascii", errors="ignore") for path in paths]
    # One text, so that a file's chance is proportional to its size.
    joined = "\n".join(text.replace("\r", " ") for text in texts)
    rows: list[Row] = []
    while len(rows) < num_rows:
        start = joined.find("\n", random.randrange(len(joined))) + 1
        piece = joined[start : start + num_bytes]
        if len(piece) == num_bytes and piece.strip():
            rows.append({"prompt": "", "answer": piece})
    return rows
