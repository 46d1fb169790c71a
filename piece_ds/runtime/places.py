"""Find out, without leaving anything, why a file or folder could not be written at a place."""

import os
import tempfile
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes; files below a folder need some


def why_no_folder(path: Path) -> str | None:
    """Return why path is no folder and cannot become one, to be read after its name; None if it can."""
    reason = _why_no_name(path)
    if reason is not None:
        return reason

    # The folder, or the nearest one above it that exists.
    absolute = path.absolute()
    nearest = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    if nearest.is_dir():
        return None
    if nearest.is_symlink():
        return f"leads through {nearest}, a link to nothing"
    return "is a file, expected a folder" if nearest == absolute else f"lies below {nearest}, which is a file"


def why_no_file(path: Path) -> str | None:
    """Return why path is no file that could be written or replaced, to be read after its name; None if it is.

    A file is written whole beside the place and renamed, so what is there now may be a link, but no folder or device.
    """
    reason = _why_no_name(path)
    if reason is not None:
        return reason
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
        return "is a folder, expected a file" if path.is_dir() else "is a pipe or device, expected a file"
    reason = why_no_folder(path.absolute().parent)
    if reason is not None:
        return f"cannot be written: its folder {reason}"
    return why_unwritable(path.absolute().parent)


def why_unwritable(folder: Path) -> str | None:
    """Return why nothing can be written in folder, or above it if it does not exist yet; None if it can."""
    place = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"piece_ds")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def _why_no_name(path: Path) -> str | None:
    text = str(path)
    if "\0" in text:
        return "holds a null byte, which no name may"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is no UTF-8 text, in which files name it"
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return "is too long a name for a file system"
    return None
