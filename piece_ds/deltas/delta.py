"""A delta file, checked once when it is opened and then read one parameter at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piece_ds.checkpoint.metadata import VERSION, checksum
from piece_ds.runtime.errors import UserError

DELTA_NAME = "delta.safetensors"
PARTS = ("indices", "values", "previous")


@dataclass(frozen=True)
class Change:
    """What a delta does to one parameter.

    Attributes:
        index: ascending flat row-major positions, int64.
        values: what stands there after the task, in the parameter's dtype.
        previous: what stood there before; None where the file does not say.
    """

    index: Tensor
    values: Tensor
    previous: Tensor | None


@dataclass(frozen=True)
class Delta:
    """An opened delta file.

    Attributes:
        path: of the file.
        metadata: its strings, see contract of delta.safetensors.
        shapes: of the parameters it changes, in the file's order.
        dtypes: of the same.
        reversible: whether it holds the previous values.
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    reversible: bool

    @property
    def num_selected(self) -> int:
        return int(self.metadata["selected"])

    @property
    def base_fingerprint(self) -> str | None:
        """Of all weights before the task; None in a file that does not say."""
        return self.metadata.get("base_fingerprint")

    @property
    def result_fingerprint(self) -> str | None:
        """Of all weights after the task."""
        return self.metadata.get("result_fingerprint")

    def change(self, name: str) -> Change:
        """The change of one parameter. Memory: its part of the file."""
        with safe_open(self.path, framework="pt") as file:
            previous = file.get_tensor(f"{name}.previous") if self.reversible else None
            return Change(file.get_tensor(f"{name}.indices").long(), file.get_tensor(f"{name}.values"), previous)


def find_deltas(paths: Sequence[Path | str]) -> list[Path]:
    """Delta files named one by one, as task folders, or as a run's folder, which means all its tasks' in order.

    Raises:
        UserError: a path that is none of these.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
        elif (path / DELTA_NAME).is_file():
            found.append(path / DELTA_NAME)
        else:
            tasks = [file for file in path.glob(f"*/{DELTA_NAME}") if file.parent.name.partition("-")[0].isdigit()]
            if not tasks:
                what = "none in it" if path.exists() else "nothing there"
                raise UserError(
                    f"{path}: expected a delta file, or a folder of a task or of a run that holds "
                    f"{DELTA_NAME}, found {what}"
                )
            found += sorted(tasks, key=lambda file: int(file.parent.name.partition("-")[0]))
    return found


def open_delta(path: Path | str) -> Delta:
    """Read a delta file whole, once, and check it.

    Raises:
        UserError: not a delta, damaged, or its parts do not fit together.
    Memory: the file's size while it is checked.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("format") != "piece-delta" or metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has format {metadata.get('format')!r} version {metadata.get('version')!r}, expected "
            f"'piece-delta' version {VERSION!r}: give a task's {DELTA_NAME}"
        )
    if "checksum" in metadata and metadata["checksum"] != checksum(tensors):
        raise UserError(f"delta {path} is damaged: its checksum does not match its content; copy it again")
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        selected = int(metadata["selected"])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"delta {path}: metadata 'shapes' or 'selected' cannot be read ({error})") from error
    reversible = any(key.endswith(".previous") for key in tensors)
    parts = PARTS if reversible else PARTS[:2]
    if set(tensors) != {f"{name}.{part}" for name in shapes for part in parts}:
        raise UserError(f"delta {path}: expected {', '.join(parts)} of {len(shapes)} parameters, found other tensors")
    for name, shape in shapes.items():
        _check_change(path, name, prod(shape), *(tensors[f"{name}.{part}"] for part in parts))
    count = sum(tensors[f"{name}.indices"].numel() for name in shapes)
    if count != selected:
        raise UserError(f"delta {path} changes {count} elements, its metadata says {selected}")
    return Delta(path, metadata, shapes, {name: tensors[f"{name}.values"].dtype for name in shapes}, reversible)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"delta {path} cannot be read as a safetensors file ({error}): give a task's {DELTA_NAME}"
        ) from error


def _check_change(path: Path, name: str, numel: int, index: Tensor, values: Tensor, *previous: Tensor) -> None:
    """Raise UserError unless index is ascending and inside the parameter, and the rest has its length and one dtype."""
    if index.dtype not in (torch.int32, torch.int64) or any(part.shape != index.shape for part in (values, *previous)):
        raise UserError(f"delta {path}: indices of {name!r} are not integers, or its parts differ in length")
    if any(part.dtype != values.dtype for part in previous):
        raise UserError(f"delta {path}: values of {name!r} are {values.dtype}, previous {previous[0].dtype}")
    index = index.long()
    if index.numel() == 0 or int(index[0]) < 0 or int(index[-1]) >= numel or bool((index[1:] <= index[:-1]).any()):
        raise UserError(f"delta {path}: indices of {name!r} are not ascending positions below {numel}")
