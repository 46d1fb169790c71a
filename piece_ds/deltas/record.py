"""piece_ds.json in a model folder: which deltas are on it, and what an interrupted change had begun."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from piece_ds.deltas.delta import Delta
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.schema import Count, read_json

RECORD_NAME = "piece_ds.json"


@dataclass(frozen=True)
class Entry:
    """One applied delta. checksum is the file's own; fingerprints are of all weights before and after it."""

    delta: str
    checksum: str | None
    method: str | None
    selected: Count
    base_fingerprint: str | None
    result_fingerprint: str | None


def entry_of(delta: Delta) -> Entry:
    name = f"{delta.path.resolve().parent.name}/{delta.path.name}"
    metadata = delta.metadata
    return Entry(
        name,
        metadata.get("checksum"),
        metadata.get("method"),
        delta.num_selected,
        delta.base_fingerprint,
        delta.result_fingerprint,
    )


@dataclass(frozen=True)
class Unfinished:
    """What patch_in_place() was about when it was interrupted.

    Attributes:
        steps: (verb, checksum of the delta), in order.
        applied: what is on the folder afterwards.
        files: file -> (fingerprint before, after), for files that change.
    """

    steps: tuple[tuple[Literal["apply", "revert"], str | None], ...]
    applied: tuple[Entry, ...]
    files: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Record:
    """What is on a folder.

    Attributes:
        applied: deltas, in order.
        unfinished: what an interrupted change was about, or None.
    """

    applied: tuple[Entry, ...] = ()
    unfinished: Unfinished | None = None

    def after(self, added: Sequence[Delta], removed: Sequence[Delta], root: Path) -> "Record":
        """The record after `removed` (last first) are taken off and `added` are put on.

        Raises:
            UserError: what is to be removed is not on top, or what is to be added is there.
        """
        applied = list(self.applied)
        for delta in removed if applied else ():
            top = applied.pop() if applied else None
            if top is None or not _same(top, entry_of(delta)):
                raise UserError(
                    f"delta {delta.path} is not the last one applied to {root}: that is "
                    f"{top.delta if top else 'none'}; revert in the reverse of the order of applying"
                )
        for delta in added:
            if any(_same(entry, entry_of(delta)) for entry in applied):
                raise UserError(f"delta {delta.path} is applied already in {root}: leave it out")
            applied.append(entry_of(delta))
        return Record(tuple(applied))


def _same(first: Entry, second: Entry) -> bool:
    """By content where both have a checksum; folders may have been renamed."""
    if first.checksum is not None and second.checksum is not None:
        return first.checksum == second.checksum and first.base_fingerprint == second.base_fingerprint
    return first == second


@dataclass(frozen=True)
class _File:
    """The content of piece_ds.json."""

    format: Literal["piece-stack"]
    version: Literal[1]
    applied: tuple[Entry, ...]
    unfinished: Unfinished | None = None


def read_record(root: Path) -> Record:
    """The folder's record; an empty one where there is no file."""
    path = root / RECORD_NAME
    if not path.is_symlink() and not path.exists():
        return Record()
    content = read_json(path, _File, "record of applied deltas", "move it away if it is none of piece_ds's")
    return Record(content.applied, content.unfinished)


def write_record(root: Path, record: Record) -> None:
    """Write the record whole; an empty one is no file."""
    path = root / RECORD_NAME
    if not record.applied and record.unfinished is None:
        path.unlink(missing_ok=True)
        return
    content = asdict(_File("piece-stack", 1, record.applied, record.unfinished))
    if record.unfinished is None:
        del content["unfinished"]
    write_json(path, content)
