"""A transformers model folder as what lies where: tensors are reached by offset and patched without rewriting the rest.

safetensors files keep header and data apart (8 bytes of length, JSON, data), so that a tensor can be mapped into
memory alone and a patched file keeps every other byte, header and tensor order included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no delta can have

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFolder:
    """A folder of safetensors files and what it says of a model's parameters.

    Attributes:
        root: the folder.
        layout: the model's parameters, from its configuration.
        stored: name in the files -> where; only tensors of parameters.
        parameter_of: name in the files -> name in layout. A tied weight may be stored under two names.
    """

    root: Path
    layout: Layout
    stored: dict[str, Stored]
    parameter_of: dict[str, str]

    @property
    def files(self) -> list[str]:
        return sorted({place.file for place in self.stored.values()})

    def in_file(self, file: str) -> list[str]:
        """Names of the tensors in one file, in the order of their data."""
        names = [name for name, place in self.stored.items() if place.file == file]
        return sorted(names, key=lambda name: self.stored[name].offset)

    def stored_as(self, parameter: str) -> list[str]:
        """Names in the files under which a parameter is stored."""
        return [name for name in self.stored if self.parameter_of[name] == parameter]


def map_bits(path: Path, place: Stored, mode: str) -> Tensor:
    """A stored tensor's bits, 1-D integers, mapped from the file at path.

    Args:
        mode: of numpy.memmap: 'c' keeps changes in memory, 'r+' writes them to the file.
    """
    assert place.dtype is not None
    if place.numel == 0:
        return torch.zeros(0, dtype=torch.int16)
    kind = _INTEGERS[place.dtype.itemsize]
    return torch.from_numpy(np.memmap(path, kind, mode, place.offset, (place.numel,)))  # type: ignore[call-overload]


def open_folder(root: Path | str, layout: Layout, known: Mapping[str, str]) -> ModelFolder:
    """Read the headers of a model folder's files.

    Args:
        layout: of the model that the folder's configuration describes.
        known: every name under which files may hold a parameter -> its name in layout.
    Raises:
        UserError: no safetensors files, one is damaged, or a parameter is not in them.
    """
    root = Path(root)
    shapes = layout.shapes()
    stored = {name: place for file in _files(root) for name, place in _header(root / file, file).items()}
    parameter_of = {name: known[name] for name in stored if name in known}
    for name, parameter in parameter_of.items():
        if stored[name].shape != shapes[parameter]:
            raise UserError(
                f"{root}: {name!r} has shape {list(stored[name].shape)}, the folder's config.json makes it "
                f"{list(shapes[parameter])}: weights and configuration do not belong together"
            )
    present = set(parameter_of.values())
    missing = [name for name in shapes if name not in present]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(shapes)} parameters are not in its files, {missing[0]!r} for "
            "one: the folder is incomplete, or transformers puts them together from parts while loading; "
            "then save the loaded model with save_pretrained(..., save_original_format=False) and use that"
        )
    return ModelFolder(root, layout, {name: stored[name] for name in parameter_of}, parameter_of)


def _files(root: Path) -> list[str]:
    """The files that hold the weights, as transformers finds them."""
    if (root / INDEX_NAME).is_file():
        try:
            files = sorted(set(json.loads((root / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{root / INDEX_NAME} is not an index of safetensors files ({error!r})") from error
        outside = next((name for name in files if not isinstance(name, str) or Path(name).name != name), None)
        if outside is not None:
            raise UserError(f"{root / INDEX_NAME} names {outside!r}: expected the name of a file in the same folder")
        return files
    if (root / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    raise UserError(
        f"{root}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither; save the model with save_pretrained() first"
    )


def _header(path: Path, file: str) -> dict[str, Stored]:
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        stored = {
            name: Stored(
                file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
            )
            for name, entry in header.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file ({error}): copy it again") from error
    if end != path.stat().st_size:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, its header says {end}: it is truncated; copy it again"
        )
    return stored
