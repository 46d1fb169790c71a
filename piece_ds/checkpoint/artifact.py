"""The one reader and writer of this package's safetensors files: masks, deltas, statistics and selected state.

The metadata of a file says what it is (format, version) and holds the sha256 of its tensors (checksum). A file is
written whole. When it is opened, the library checks the header, and this module checks the metadata. No other module
opens such a file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from piece_ds.checkpoint.metadata import Metadata
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_whole
from piece_ds.runtime.schema import checked, require_file
from piece_ds.state.partition import index_dtype

# What the library and torch raise for a damaged header or tensor.
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        format: entry of its metadata.
        versions: versions that can be read, the newest last.
        what: name of the kind in messages.
        remedy: what to do if a file cannot be used.
        needs_checksum: whether a file without one is refused. Masks and deltas of other programs may have none.
    """

    format: str
    versions: tuple[str, ...]
    what: str
    remedy: str
    needs_checksum: bool = False


MASK = Kind("piece-mask", ("1", "2"), "mask", "write it again with piece_ds select")
DELTA = Kind("piece-delta", ("1", "2", "3"), "delta", "copy it again, or give a task's delta.safetensors")
STATISTICS = Kind("piece-statistics", ("1",), "statistics", "take the statistics again", needs_checksum=True)
BEST = Kind("piece-best", ("1",), "checkpoint", "resume from an earlier checkpoint", needs_checksum=True)
SELECTED = Kind("piece-selected", ("1",), "checkpoint", "resume from an earlier checkpoint", needs_checksum=True)


@dataclass(frozen=True)
class Artifact:
    """An open file of one kind.

    Attributes:
        path: of the file.
        kind: what it was opened as.
        strings: its metadata, as the file holds them.
        metadata: the same, checked; numbers are numbers.
        names: of its tensors.
        held: all tensors by name, if the file was opened with hold.
    """

    path: Path
    kind: Kind
    strings: Mapping[str, str]
    metadata: Metadata
    names: tuple[str, ...]
    _file: Any
    held: Mapping[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU. Raise UserError if it cannot be read."""
        if self.held is not None and name in self.held:
            return self.held[name]
        try:
            return self._file.get_tensor(name)
        except _UNREADABLE as error:
            raise _unreadable(self.path, self.kind, error) from None

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a 1-D tensor. Raise UserError unless it is 1-D and has them."""
        try:
            # A slice reads only its own bytes.
            piece = self._file.get_slice(name)
            if len(piece.get_shape()) != 1 or piece.get_shape()[0] < stop:
                raise ValueError(f"{name!r} has shape {piece.get_shape()}, expected one dimension of {stop} or more")
            return piece[start:stop]
        except _UNREADABLE as error:
            raise _unreadable(self.path, self.kind, error) from None

    def refuse(self, problem: str) -> UserError:
        """Return the error that reports a problem of this file."""
        return UserError(f"{self.kind.what} {self.path}: {problem}; {self.kind.remedy}")


@contextmanager
def open_artifact(path: Path | str, kind: Kind, verify: bool = True, *, hold: bool = False) -> Iterator[Artifact]:
    """Open a file of a kind, for as long as the block lasts.

    Args:
        path: of the file.
        kind: what it must be.
        verify: compare the checksum. Pass False only if the same file has just been verified.
        hold: read the whole file at once, which is several times faster for many small tensors.
    Raises:
        UserError: the file is missing, truncated, damaged or of another format or version, or has invalid metadata.
    Cost: verify reads every tensor once. Memory: the largest tensor; with hold, the file.
    """
    path = Path(path)
    require_file(path, kind.what, kind.remedy)
    try:
        file = safe_open(path, framework="pt")
        strings = dict(file.metadata() or {})
        names = tuple(file.keys())
        held = load(path.read_bytes()) if hold else None
    except _UNREADABLE as error:
        raise _unreadable(path, kind, error) from None
    with file:
        _check_kind(path, kind, strings)
        metadata = checked(strings, Metadata, f"{kind.what} {path}: metadata", kind.remedy)
        artifact = Artifact(path, kind, strings, metadata, names, file, held)
        contradiction = metadata.contradiction()
        if contradiction is not None:
            raise artifact.refuse(f"its metadata contradict each other: {contradiction}")
        # Files of other programs may have no checksum: they are read, if their kind allows it.
        must_match = verify and (metadata.checksum is not None or kind.needs_checksum)
        if must_match and metadata.checksum != _checksum(artifact.names, artifact.tensor):
            raise UserError(f"{kind.what} {path} is damaged: its checksum does not match its content; {kind.remedy}")
        yield artifact


def write_artifact(
    path: Path | str, kind: Kind, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], version: str | None = None
) -> str:
    """Write a file of a kind, whole. Format, version and checksum are added to the metadata.

    Args:
        path: of the file.
        kind: what it is.
        tensors: name -> tensor on the CPU.
        metadata: further entries.
        version: None means the first, which every reader of the kind accepts.
    Returns:
        The checksum.
    Raises:
        MachineError: the file cannot be written; an existing file at path is unchanged.
    """
    strings = {
        **metadata,
        "format": kind.format,
        "version": version or kind.versions[0],
        "checksum": checksum(tensors),
    }
    write_tensors(path, tensors, strings)
    return strings["checksum"]


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole, in another tool's layout. Files of a Kind go through write_artifact().

    Equal content gives equal bytes.
    """

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, dict(metadata))
        os.chmod(temporary, mode)  # safetensors would let only the owner read it
        _sort_metadata(temporary)

    write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a new safetensors file in the order of their names: the library's order is random."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        first = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))}
        sorted_bytes = json.dumps(first | header, separators=(",", ":"), ensure_ascii=False).encode()
        # Tensors begin where the header ends: only a header that fits the same place may stand there.
        if len(sorted_bytes) <= length:
            file.seek(8)
            file.write(sorted_bytes.ljust(length))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names and bytes of CPU tensors, in the order of names."""
    return _checksum(tensors, tensors.__getitem__)


def index_tensor(index: Tensor, numel: int) -> Tensor:
    """Return flat positions as files store them: int32, or int64 for a parameter too large for int32."""
    return index.to(index_dtype(numel))


def check_index(artifact: Artifact, name: str, index: Tensor, numel: int | None) -> None:
    """Raise UserError unless index holds one or more ascending positions.

    Args:
        artifact: the open file, for the message.
        name: of the parameter.
        index: the positions, as read.
        numel: elements of the parameter; None if the file does not say.
    """
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        raise artifact.refuse(
            f"indices of {name!r} are {index.dtype} with {index.dim()} dimensions, expected 1-D int32 or int64"
        )
    # Strictly ascending, so that no element is written twice and the last position bounds all.
    bound = 2**63 - 1 if numel is None else numel
    if index.numel() == 0 or int(index[0]) < 0 or int(index[-1]) >= bound or bool((index[1:] <= index[:-1]).any()):
        raise artifact.refuse(f"indices of {name!r} are not ascending positions below {bound}")


def _check_kind(path: Path, kind: Kind, strings: Mapping[str, str]) -> None:
    if strings.get("format") != kind.format or strings.get("version") not in kind.versions:
        expected = " or ".join(repr(version) for version in kind.versions)
        found = f"format {strings.get('format')!r:.60} version {strings.get('version')!r:.60}"
        raise UserError(f"{kind.what} {path} has {found}, expected {kind.format!r} version {expected}; {kind.remedy}")


def _checksum(names: Any, read: Any) -> str:
    """Return the sha256 of tensors that read() returns one by one. Memory: one tensor."""
    digest = hashlib.sha256()
    # Names are part of the digest: two tensors of equal bytes cannot be exchanged unnoticed.
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(read(name).contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unreadable(path: Path, kind: Kind, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{kind.what} {path} cannot be read as a safetensors file ({reason}): it is truncated or damaged; {kind.remedy}"
    )
