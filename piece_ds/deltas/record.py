"""piece_ds.json in a model folder: which deltas are applied, and what an interrupted change had begun."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from piece_ds.deltas.delta import RECORD_NAME, Delta
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.schema import Count, read_json


@dataclass(frozen=True)
class Entry:
    """One applied delta.

    Attributes:
        delta: folder and name of its file.
        checksum: of the file's tensors.
        method: of the selection.
        selected: elements it changes.
        base_fingerprint, result_fingerprint: of all weights before and after it.
    """

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
    """What patch_in_place() was doing when it was interrupted.

    Attributes:
        steps: (verb, checksum of the delta), in order.
        applied: deltas on the folder afterwards.
        files: file -> (fingerprint before, after), for files that change.
    """

    steps: tuple[tuple[Literal["apply", "revert"], str | None], ...]
    applied: tuple[Entry, ...]
    files: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Record:
    """Which deltas are applied to a folder.

    Attributes:
        applied: deltas, in order.
        unfinished: an interrupted change; None if there is none.
    """

    applied: tuple[Entry, ...] = ()
    unfinished: Unfinished | None = None

    def after(self, added: Sequence[Delta], removed: Sequence[Delta], root: Path) -> "Record":
        """Return the record after `removed` are reverted, last first, and `added` are applied.

        Raises:
            UserError: a delta to revert is not on top, a delta to apply is there already, or one is given twice.
        """
        applied = list(self.applied)
        # A folder without a record (a plain copy) may hold deltas all the same: verify() decides then.
        for number, delta in enumerate(removed if applied else ()):
            refuse_again(delta, removed[:number])
            top = applied.pop() if applied else None
            if top is None or _identity(top) != _identity(entry_of(delta)):
                raise UserError(
                    f"delta {delta.path} is not the last one applied to {root}: that is "
                    f"{top.delta if top else 'none'}; revert in the reverse of the order of applying"
                )
        known = {_identity(entry) for entry in applied}
        for number, delta in enumerate(added):
            entry = entry_of(delta)
            # Weights may come back to where they were: the same change then follows on its own undoing.
            end = applied[-1].result_fingerprint if applied else None
            continues = end is not None and end == entry.base_fingerprint
            if _identity(entry) in known and not continues:
                refuse_again(delta, added[:number])
                raise UserError(f"delta {delta.path} is applied already in {root}: leave it out")
            known.add(_identity(entry))
            applied.append(entry)
        return Record(tuple(applied))


def refuse_again(delta: Delta, before: Sequence[Delta]) -> None:
    """Raise UserError if a delta is among those that are given before it."""
    again = _identity(entry_of(delta))
    same = next((other for other in before if _identity(entry_of(other)) == again), None)
    if same is not None:
        copied = "" if same.path == delta.path else f" (as {same.path} too)"
        raise UserError(f"delta {delta.path} is given twice{copied}: leave one out")


def _identity(entry: Entry) -> tuple[str, str | None] | Entry:
    """Return what tells a delta from others: its content if it has a checksum, as folders may be renamed."""
    return entry if entry.checksum is None else (entry.checksum, entry.base_fingerprint)


@dataclass(frozen=True)
class _File:
    """Content of piece_ds.json."""

    format: Literal["piece-stack"]
    version: Literal[1]
    applied: tuple[Entry, ...]
    unfinished: Unfinished | None = None


def read_record(root: Path) -> Record:
    """Return the folder's record; an empty one if there is no file."""
    path = root / RECORD_NAME
    if not path.is_symlink() and not path.exists():
        return Record()
    content = read_json(path, _File, "record of applied deltas", "move it away if it is none of piece_ds's")
    return Record(content.applied, content.unfinished)


def write_record(root: Path, record: Record) -> None:
    """Write the record whole. An empty record removes the file."""
    path = root / RECORD_NAME
    if not record.applied and record.unfinished is None:
        path.unlink(missing_ok=True)
        return
    content = asdict(_File("piece-stack", 1, record.applied, record.unfinished))
    if record.unfinished is None:
        del content["unfinished"]
    write_json(path, content)
