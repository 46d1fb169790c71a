"""Write files whole: to a temporary name in the same folder, flushed to disk, then renamed over the target."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from piece_ds.runtime.errors import MachineError

# What write_whole() and write_folder() leave behind if the process is killed in between.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def write_whole(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then put the result at path in one step. A crash leaves the old file, or none.

    Args:
        path: of the file. Missing folders are made.
        write: writes the path that it is given.
    Raises:
        MachineError: the disk is full, the folder cannot be written, ... What was at path is unchanged.
    """
    path = Path(path)
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        _remove(temporary)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(a temporary folder), then put that folder at path in one step. A crash leaves no folder at path.

    Args:
        path: must not exist, or be an empty folder.
        write: fills the folder that it is given.
    Raises:
        MachineError: the disk is full, the folder cannot be written, ... Then nothing is at path.
    """
    temporary = temporary_of(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        let_others_read(temporary)
        for file in (entry for entry in temporary.rglob("*") if entry.is_file()):
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def let_others_read(folder: Path) -> None:
    """Give every file below a folder that this process has made the readers of the folder, as its umask says.

    safetensors, and programs that write by it, let only the owner read.
    """
    mode = folder.stat().st_mode & 0o666
    for file in (entry for entry in folder.rglob("*") if entry.is_file()):
        os.chmod(file, mode)


def not_written(path: Path | str, error: BaseException) -> MachineError:
    """Return the error to raise if writing to path failed."""
    # The disk that is full is the one of the nearest folder that exists.
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    return MachineError(
        f"{path} could not be written ({error}; {shutil.disk_usage(folder).free} bytes are free there): what was there "
        "before is as it was; free or mend the disk, then run the same command again (a training run with "
        "--resume_from_checkpoint True)"
    )


def temporary_of(path: Path) -> Path:
    """Return where this process writes what will be at path."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def temporaries(folder: Path) -> Iterator[Path]:
    """Yield the temporary files and folders that killed processes left under folder, at any depth."""
    yield from [path for path in folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left under folder. Call it only while nobody writes there."""
    for path in temporaries(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems have no fsync of folders
        pass
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: object) -> None:
    """Write value as indented JSON, whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _remove(temporary: Path) -> None:
    with suppress(OSError):  # a folder that cannot be written is being reported already
        temporary.unlink(missing_ok=True)
