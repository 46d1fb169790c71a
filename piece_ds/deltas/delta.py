"""A delta file. It is checked once, when it is opened, and then read one parameter at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import DELTA, Artifact, open_artifact
from piece_ds.checkpoint.delta_parts import FLOATS, INDICES, PREVIOUS, UNSCALED, VALUES, parts_of, read_change
from piece_ds.deltas.chain_files import link_files, sorted_by_task
from piece_ds.runtime.errors import UserError

DELTA_NAME = "delta.safetensors"
RECORD_NAME = "piece_ds.json"  # in a model folder: see record.py

# Files of a stack that are kept in memory: 1000 links of 60 KB. Positions take up to six times as much there.
_HELD_BYTES = 64 << 20


@dataclass(frozen=True)
class Change:
    """What a delta does to one parameter.

    Attributes:
        index: ascending flat row-major positions, int64.
        values: values after the task, in the parameter's dtype.
        previous: values before the task; None if the file does not hold them.
        unscaled: values that a scaled delta would have at scale 1; None if those are values.
    """

    index: Tensor
    values: Tensor
    previous: Tensor | None
    unscaled: Tensor | None = None


@dataclass(frozen=True)
class Delta:
    """An opened delta file.

    Attributes:
        path: of the file.
        metadata: its strings; see checkpoint.metadata.Metadata.
        shapes: of the parameters it changes, in the file's order.
        dtypes: of the same parameters.
        reversible: whether it holds the previous values.
        scale: factor of the task's changes. Unless it is 1, the file holds the unscaled values too.
        held: all changes, if the file was opened with hold; None means that each is read when it is asked for.
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    reversible: bool
    scale: float = 1.0
    held: Mapping[str, Change] | None = field(default=None, repr=False, compare=False)

    @property
    def num_selected(self) -> int:
        return int(self.metadata["selected"])

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of all weights before the task; None if the file does not say."""
        return self.metadata.get("base_fingerprint")

    @property
    def result_fingerprint(self) -> str | None:
        """Fingerprint of all weights after the task; None if the file does not say."""
        return self.metadata.get("result_fingerprint")

    def change(self, name: str) -> Change:
        """Return the change of one parameter. Memory: its part of the file."""
        if self.held is not None:
            return self.held[name]
        # open_delta() has verified the checksum.
        with open_artifact(self.path, DELTA, verify=False) as file:
            return self._read(file, name)

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Yield (parameter name, change), in the file's order. The file is opened once."""
        if self.held is not None:
            yield from self.held.items()
            return
        with open_artifact(self.path, DELTA, verify=False) as file:
            for name in self.shapes:
                yield name, self._read(file, name)

    def _read(self, file: Artifact, name: str) -> Change:
        parts = [VALUES, *([PREVIOUS] if self.reversible else []), *([UNSCALED] if self.scale != 1.0 else [])]
        return _change(read_change(file, name, prod(self.shapes[name]), parts))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a null byte: opening it says so
        return False


def find_deltas(paths: Sequence[Path | str]) -> list[Path]:
    """Return the delta files that paths name.

    Args:
        paths: delta files, task folders, run folders, or folders of a chain's links. A run folder means all its
            tasks, a chain's folder all its links, in order.
    Raises:
        UserError: a path is none of these.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
        elif (path / DELTA_NAME).is_file():
            found.append(path / DELTA_NAME)
        elif links := link_files(path):
            found += links
        else:
            # Folders of tasks begin with a number; a folder named otherwise is no task of the run.
            tasks = sorted_by_task(path.glob(f"*/{DELTA_NAME}"))
            if not tasks:
                what = "none in it" if path.exists() else "nothing there"
                if (path / RECORD_NAME).is_file():
                    what += f"; it is a model folder, whose {RECORD_NAME} names the deltas that are applied"
                raise UserError(
                    f"{path}: expected a delta file, or a folder of a task or of a run that holds "
                    f"{DELTA_NAME}, found {what}"
                )
            found += tasks
    return found


def open_deltas(paths: Sequence[Path | str]) -> list[Delta]:
    """Open the delta files that paths name; see find_deltas(). Small ones stay in memory.

    A chain has thousands of small links, and each is asked for every parameter: reading them anew would open a file
    millions of times.

    Raises:
        UserError: a path names no delta, or a file is damaged.
    Memory: what _HELD_BYTES of files hold, and the largest tensor.
    """
    room, deltas = _HELD_BYTES, []
    for path in find_deltas(paths):
        # What is not there is open_delta()'s to report.
        size = path.stat().st_size if path.is_file() else 0
        deltas.append(open_delta(path, hold=size <= room))
        room -= size if size <= room else 0
    return deltas


def open_delta(path: Path | str, *, hold: bool = False) -> Delta:
    """Read a delta file whole, once, and check it.

    Args:
        path: of the file, or a folder that holds one delta, such as a task's.
        hold: keep the changes in memory, so that the file is not read again.
    Raises:
        UserError: the file is no delta or damaged, or its parts do not fit together; a folder holds another number.
    Memory: the largest tensor; with hold, the file.
    """
    path = Path(path)
    if _is_folder(path):
        found_files = find_deltas([path])
        if len(found_files) > 1:
            raise UserError(f"{path} holds {len(found_files)} deltas: open one of them, such as {found_files[0]}")
        path = found_files[0]
    with open_artifact(path, DELTA, hold=hold) as file:
        if file.metadata.shapes is None or file.metadata.selected is None:
            raise file.refuse("metadata 'shapes' or 'selected' is missing")

        # The metadata say which tensors there must be.
        shapes = {name: tuple(shape) for name, shape in file.metadata.shapes.items()}
        scale, parts = file.metadata.scale, parts_of(file, shapes)
        if parts is None or (UNSCALED in parts) != (scale != 1.0) or (UNSCALED in parts and PREVIOUS not in parts):
            raise file.refuse(f"expected positions and values of {len(shapes)} parameters, found other tensors")

        # Check each parameter's part, and the total.
        dtypes, count = {}, 0
        held: dict[str, Change] = {}
        for name, shape in shapes.items():
            found = read_change(file, name, prod(shape), parts)
            _check_change(file, name, found)
            dtypes[name], count = found[VALUES].dtype, count + found[INDICES].numel()
            if hold:
                held[name] = _change(found)
        if count != file.metadata.selected or count == 0:
            raise file.refuse(f"it changes {count} elements, its metadata says {file.metadata.selected}")
        return Delta(path, dict(file.strings), shapes, dtypes, PREVIOUS in parts, scale, held if hold else None)


def _change(found: Mapping[str, Tensor]) -> Change:
    return Change(found[INDICES], found[VALUES], found.get(PREVIOUS), found.get(UNSCALED))


def _check_change(file: Artifact, name: str, found: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the parts of a parameter have one length, and all but the positions one dtype."""
    if any(part.shape != found[INDICES].shape for part in found.values()):
        raise file.refuse(f"parts of {name!r} differ in length")
    dtype = found[VALUES].dtype
    if dtype not in FLOATS.values():
        raise file.refuse(f"values of {name!r} are {dtype}, expected a dtype that models are trained in")
    for part in (PREVIOUS, UNSCALED):
        if part in found and found[part].dtype != dtype:
            raise file.refuse(f"values of {name!r} are {dtype}, {part} {found[part].dtype}")
