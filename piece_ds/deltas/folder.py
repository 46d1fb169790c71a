"""A transformers model folder seen as files of bytes: tensors are reached by offset and patched in place.

A safetensors file keeps header and data apart (8 bytes of length, JSON, data). So one tensor can be mapped into memory
by itself. A patched file keeps every other byte, its header and the order of tensors.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piece_ds.models.stored_names import Part, StoredNames
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import read_json, require_file
from piece_ds.state.partition import Layout
from piece_ds.state.weights_hash import hash_elements, hash_range

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements of a scattered part that are hashed at a time: 128 MiB of positions and temporaries.
_HASHED_AT_ONCE = 1 << 22
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
        parameter_of: name in the files -> name in layout. A tied weight may be stored under two names, and experts that
            transformers stacks under a name for each part.
        parts: name in the files -> which elements of its parameter it holds; all of them if it is not here.
    """

    root: Path
    layout: Layout
    stored: dict[str, Stored]
    parameter_of: dict[str, str]
    parts: dict[str, Part]

    @property
    def files(self) -> list[str]:
        return sorted({place.file for place in self.stored.values()})

    def in_file(self, file: str) -> list[str]:
        """Return the names of the tensors in one file, in the order of their data; parts of a parameter together."""
        names = [name for name, place in self.stored.items() if place.file == file]
        names.sort(key=lambda name: self.stored[name].offset)
        order = {parameter: place for place, parameter in enumerate(dict.fromkeys(map(self.parameter_of.get, names)))}
        return sorted(names, key=lambda name: order[self.parameter_of[name]])

    def stored_as(self, parameter: str) -> list[str]:
        """Return the names under which the files hold a parameter."""
        return [name for name in self.stored if self.parameter_of[name] == parameter]

    def held(self, name: str) -> tuple[str, Part | None]:
        """Return what a stored tensor holds: a parameter, and which part of it. Two that hold the same are copies."""
        return self.parameter_of[name], self.parts.get(name)

    def locate(self, name: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return places in index (int64, of the parameter) that a stored tensor holds, and their positions in it."""
        part = self.parts.get(name)
        return (torch.arange(index.numel()), index) if part is None else part.locate(index)

    def hash_of(self, name: str, bits: Tensor) -> int:
        """Return the sum of the hashes of a stored tensor's elements, as elements of its parameter.

        Args:
            name: of the tensor in the files.
            bits: all of it, 1-D integers.
        """
        parameter, part = self.held(name)
        if part is None or part.is_run:
            return hash_range(parameter, bits, 0 if part is None else part.offset)
        total = 0
        for begin in range(0, bits.numel(), _HASHED_AT_ONCE):
            piece = bits[begin : begin + _HASHED_AT_ONCE]
            total += hash_elements(parameter, part.positions(begin, begin + piece.numel()), piece)
        return total % 2**64

    def bits_of(self, parameter: str) -> Tensor:
        """Return a whole parameter's bits, 1-D integers; put together in memory if the files hold it in parts."""
        names = self.stored_as(parameter)
        first = map_bits(self.root / self.stored[names[0]].file, self.stored[names[0]], "c")
        if names[0] not in self.parts:
            return first
        whole = torch.empty(prod(self.layout.shapes()[parameter]), dtype=first.dtype)
        for name in names:
            place = self.stored[name]
            self.parts[name].of(whole).copy_(map_bits(self.root / place.file, place, "c").view(place.shape))
        return whole

    def split(self, parameter: str, index: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (stored tensor, places in index, ascending positions) for each that holds some elements of index.

        Args:
            parameter: whose elements they are.
            index: ascending flat positions in it, int64.
        """
        for name in self.stored_as(parameter):
            places, positions = self.locate(name, index)
            if positions.numel():
                order = positions.argsort()
                yield name, places[order], positions[order]


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


def open_folder(root: Path | str, layout: Layout, known: StoredNames) -> ModelFolder:
    """Read the headers of a model folder's files.

    Args:
        root: the folder.
        layout: of the model that the folder's configuration describes.
        known: every name under which files may hold a parameter or a part of one.
    Raises:
        UserError: no safetensors files, a damaged one, or a parameter that is missing or of another shape.
    """
    root = Path(root)
    shapes = layout.shapes()
    stored = _stored(root)

    # What the files hold must be what the configuration describes ...
    parts = {name: known.parts[name] for name in stored if name in known.parts}
    parameter_of = {name: known.whole[name] for name in stored if name in known.whole}
    parameter_of |= {name: part.parameter for name, part in parts.items()}
    for name, parameter in parameter_of.items():
        expected = parts[name].shape if name in parts else shapes[parameter]
        if stored[name].shape != expected:
            raise UserError(
                f"{root}: {name!r} has shape {list(stored[name].shape)}, the folder's config.json makes it "
                f"{list(expected)}: weights and configuration do not belong together"
            )

    # ... and all of it.
    missing = _missing(root, shapes, parameter_of, parts)
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(shapes)} parameters are not in its files, {missing[0]!r} for "
            "one: the folder is incomplete, or transformers puts them together from parts while loading; "
            "then save the loaded model with save_pretrained(..., save_original_format=False) and use that"
        )
    return ModelFolder(root, layout, {name: stored[name] for name in parameter_of}, parameter_of, parts)


def _missing(
    root: Path, shapes: dict[str, tuple[int, ...]], parameter_of: dict[str, str], parts: dict[str, Part]
) -> list[str]:
    """Return names of the parameters that are not whole in the files. Raise UserError if one is whole and in parts."""
    held = dict.fromkeys(shapes, 0)
    for part in parts.values():
        held[part.parameter] += prod(part.shape)
    for name, parameter in parameter_of.items():
        if name not in parts and held[parameter]:
            other = next(stored for stored, part in parts.items() if part.parameter == parameter)
            raise UserError(
                f"{root}: {parameter!r} is stored whole, as {name!r}, and in parts, as {other!r}: which one counts "
                "depends on the program that loads it; copy the model folder again"
            )
    whole = {parameter for name, parameter in parameter_of.items() if name not in parts}
    return [name for name, shape in shapes.items() if name not in whole and held[name] != max(prod(shape), 1)]


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
