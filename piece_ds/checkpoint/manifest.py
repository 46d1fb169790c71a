"""Mark a folder as complete: its SHA256SUMS names every file with its checksum and is written last.

The format is that of the sha256sum command. So `sha256sum -c SHA256SUMS` in the folder checks it without this project.
A folder without the file was not finished, or is not ours.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from piece_ds.runtime.distributed import all_gather_objects, barrier, is_main, rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import sync_folder, write_text
from piece_ds.runtime.schema import read_file, require_file

SUMS_NAME = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path | str, names: Iterable[str] | None = None) -> None:
    """Flush files to the disk, then write their checksums. A collective; all return when it is done.

    Args:
        folder: a folder that all ranks see.
        names: files or folders in it, relative; None means everything in it.
    Cost: reads every file once; the files are divided over the ranks.
    """
    folder = Path(folder)
    barrier()
    found = [folder / name for name in names] if names is not None else [folder]
    files = _files(folder, found)

    # Each rank reads a part of the files. Flushing them first makes the manifest the last thing on disk.
    own = {name: _digest(folder / name, sync=True) for name in files[rank() :: world_size()]}
    sums = {name: digest for share in all_gather_objects(own) for name, digest in share.items()}  # type: ignore[attr-defined]

    # One rank collects the digests.
    if is_main():
        for inner in sorted({(folder / name).parent for name in files}):
            sync_folder(inner)
        write_text(folder / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    barrier()


def is_complete(folder: Path | str) -> bool:
    """Return whether write_manifest() has finished."""
    return (Path(folder) / SUMS_NAME).is_file()


def verify_manifest(folder: Path | str, inside: str = "", whole: bool = False) -> None:
    """Raise UserError, on all ranks, unless every file of the manifest is there and unchanged. A collective.

    Args:
        folder: a folder that all ranks see.
        inside: check only names with this prefix.
        whole: refuse files that the manifest does not name too, except hidden ones.
    Cost: reads every file once; the files are divided over the ranks.
    """
    folder = Path(folder)
    problem: str | None = None
    try:
        sums = {name: digest for name, digest in read_sums(folder).items() if name.startswith(inside)}
        problem = _first_unnamed(folder, sums) if whole else None
        problem = problem or _first_problem(folder, {name: sums[name] for name in sorted(sums)[rank() :: world_size()]})
    except UserError as error:
        problem = str(error)
    # One rank's problem ends all: none may wait for it later.
    problems = [found for found in all_gather_objects(problem) if found]
    if problems:
        raise UserError(str(problems[0]))


def read_sums(folder: Path) -> dict[str, str]:
    """Return name -> sha256, as SHA256SUMS holds them.

    Raises:
        UserError: the file is missing or damaged, or names something outside the folder.
    """
    path = folder / SUMS_NAME
    try:
        text = read_file(path, "manifest", "the folder was not written to its end").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}): the folder was not written to its end") from None
    if not text:
        raise UserError(f"{path} is empty: it is damaged, or the folder was not written to its end")
    sums = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        # Two spaces between digest and name, as sha256sum writes them.
        digest, separator, name = line.partition("  ")
        if not separator or not _SHA256.fullmatch(digest) or not _is_inside(name):
            raise UserError(f"{path} line {number}: expected a sha256 and a file in the folder, got {line[:80]!r}")
        if name in sums:
            raise UserError(f"{path} line {number}: {name[:80]!r} stands twice: it is damaged")
        sums[name] = digest
    return sums


def _first_problem(folder: Path, sums: dict[str, str]) -> str | None:
    for name, digest in sums.items():
        try:
            require_file(folder / name, "file", f"it was there when {SUMS_NAME} was written")
            found = _digest(folder / name)
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror}): it was there when {SUMS_NAME} was written"
        if found != digest:
            return f"{folder / name} is damaged: its sha256 is {found[:12]}..., {SUMS_NAME} says {digest[:12]}..."
    return None


def _first_unnamed(folder: Path, sums: dict[str, str]) -> str | None:
    """Return what is wrong if a file is not named in sums; None if all are. Hidden files are a file system's own."""
    name = next((name for name in _files(folder, [folder]) if name not in sums and not _is_hidden(name)), None)
    return (
        None
        if name is None
        else f"{folder / name} is not named in {SUMS_NAME}, so it was put there later: move it away"
    )


def _is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders is hidden."""
    return any(part.startswith(".") for part in Path(name).parts)


def _is_inside(name: str) -> bool:
    """Return whether a name means something below the folder that it is relative to."""
    parts = Path(name).parts
    return bool(parts) and "\0" not in name and not Path(name).is_absolute() and ".." not in parts


def _files(folder: Path, found: list[Path]) -> list[str]:
    inner = [path for top in found for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in inner if path.name != SUMS_NAME)


def _digest(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
