"""A transformers model folder seen as files of bytes: tensors are reached by offset and patched in place.

A safetensors file keeps header and data apart (8 bytes of length, JSON, data). So one tensor can be mapped into memory
by itself. A patched file keeps every other byte, its header and the order of tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import read_json, require_file
from piece_ds.state.partition import Layout

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: name of the file in the folder.
        offset: of its first byte in the file.
        shape: of the tensor.
        dtype: None for a dtype that no delta can have.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no delta can have

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class _Index:
    """The part of model.safetensors.index.json that is needed here."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class ModelFolder:
    """A folder of safetensors files and how they hold a model's parameters.

    Attributes:
        root: the folder.
        layout: the model's parameters, from its configuration.
        stored: name in the files -> place; only tensors of parameters.
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
        """Return the names of the tensors in one file, in the order of their data."""
        names = [name for name, place in self.stored.items() if place.file == file]
        return sorted(names, key=lambda name: self.stored[name].offset)

    def stored_as(self, parameter: str) -> list[str]:
        """Return the names under which the files hold a parameter."""
        return [name for name in self.stored if self.parameter_of[name] == parameter]


def map_bits(path: Path, place: Stored, mode: str) -> Tensor:
    """Map a stored tensor's bits from the file at path, as 1-D integers.

    Args:
        path: of the file, or of a copy.
        place: where the tensor lies in it.
        mode: of numpy.memmap. 'c' keeps changes in memory, 'r+' writes them to the file.
    """
    assert place.dtype is not None
    if place.numel == 0:
        return torch.zeros(0, dtype=torch.int16)
    kind = _INTEGERS[place.dtype.itemsize]
    return torch.from_numpy(np.memmap(path, kind, mode, place.offset, (place.numel,)))  # type: ignore[call-overload]


def open_folder(root: Path | str, layout: Layout, known: Mapping[str, str]) -> ModelFolder:
    """Read the headers of a model folder's files.

    Args:
        root: the folder.
        layout: of the model that the folder's configuration describes.
        known: every name under which files may hold a parameter -> its name in layout.
    Raises:
        UserError: no safetensors files, a damaged one, or a parameter that is missing or of another shape.
    """
    root = Path(root)
    shapes = layout.shapes()
    stored = _stored(root)

    # What the files hold must be what the configuration describes ...
    parameter_of = {name: known[name] for name in stored if name in known}
    for name, parameter in parameter_of.items():
        if stored[name].shape != shapes[parameter]:
            raise UserError(
                f"{root}: {name!r} has shape {list(stored[name].shape)}, the folder's config.json makes it "
                f"{list(shapes[parameter])}: weights and configuration do not belong together"
            )

    # ... and all of it.
    present = set(parameter_of.values())
    missing = [name for name in shapes if name not in present]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(shapes)} parameters are not in its files, {missing[0]!r} for "
            "one: the folder is incomplete, or transformers puts them together from parts while loading; "
            "then save the loaded model with save_pretrained(..., save_original_format=False) and use that"
        )
    return ModelFolder(root, layout, {name: stored[name] for name in parameter_of}, parameter_of)


def _files(root: Path) -> dict[str, dict[str, str]]:
    """Return file -> names that the index places in it, for the files that transformers would load.

    A single file has no index; its names are empty.
    """
    # transformers and other programs disagree which of two wins, so two are refused.
    both = [name for name in (SINGLE_NAME, INDEX_NAME) if (root / name).exists()]
    if len(both) == 2:
        raise UserError(
            f"{root} holds {SINGLE_NAME} and {INDEX_NAME}: transformers loads the first, other programs the second; "
            "move away the one that is not the model"
        )
    if not both:
        raise UserError(
            f"{root}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither; save the model with save_pretrained() "
            "first"
        )
    if both == [SINGLE_NAME]:
        return {SINGLE_NAME: {}}
    index = read_json(root / INDEX_NAME, _Index, "index of safetensors files", "copy the model folder again")
    found: dict[str, dict[str, str]] = {}
    for name, file in index.weight_map.items():
        # A name with a folder in it would be a file outside the model folder.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{root / INDEX_NAME} names {file[:80]!r}: expected the name of a safetensors file in the same folder"
            )
        found.setdefault(file, {})[name] = file
    return dict(sorted(found.items()))


def _stored(root: Path) -> dict[str, Stored]:
    """Return every tensor of the folder's files.

    Raise UserError unless each is only in the file that the index names.
    """
    files = _files(root)
    stored: dict[str, Stored] = {}
    for file, indexed in files.items():
        header = _header(root / file, file)
        elsewhere = {name for other in files.values() for name in other} - indexed.keys()
        twice = next((name for name in header if name in stored or name in elsewhere), None)
        if twice is not None:
            raise UserError(
                f"{root}: {twice!r} is in {file} and, by {INDEX_NAME}, in another file: which one counts depends on "
                "the program that loads it; copy the model folder again"
            )
        stored |= header
    return stored


def _header(path: Path, file: str) -> dict[str, Stored]:
    """Return the tensors of one file. The safetensors library checks the header; we read the offsets from it."""
    require_file(path, "model file", "copy the model folder again")
    try:
        # The library finds headers that do not fit the file.
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        return {
            name: Stored(
                file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
            )
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read as a safetensors file ({reason}): it is truncated or damaged; copy it again"
        ) from None
