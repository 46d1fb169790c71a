"""What a published set of task deltas holds: its files, and the manifest that says what each of them is.

A repository of deltas has the layout of a run's folder, so that what was pulled is used like a run:

    piece_ds_deltas.json         the manifest: the order of the deltas, sha256 and size of every file, the base
    00-law/delta.safetensors     one folder a task (a lone delta lies beside the manifest)
    00-law/mask.safetensors      if masks were asked for
    general_statistics/...       of general text, if they were asked for
    figures/results-....png      of the card
    README.md                    the card; not in the manifest, since people edit it
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from piece_ds.checkpoint.artifact import MASK, open_artifact
from piece_ds.checkpoint.statistics_file import has_statistics
from piece_ds.deltas.delta import DELTA_NAME, Delta, find_deltas, open_delta
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import Count, read_json
from piece_ds.runtime.text import printable

MANIFEST_NAME, CARD_NAME, MASK_NAME = "piece_ds_deltas.json", "README.md", "mask.safetensors"
STATISTICS_FOLDER = "general_statistics"
# Paths that a manifest may name. Nothing else of a repository is written, replaced or removed.
_ARTIFACT = re.compile(r"([0-9]{1,9}-[^/\\:]{1,180}/)?(delta|mask)\.safetensors")
_STATISTICS = re.compile(r"general_statistics/statistics(\.json|-[0-9]{5}-of-[0-9]{5}\.safetensors)")
_FIGURE = re.compile(r"figures/results-[\w.-]{1,180}\.png")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_MAX_MANIFEST_BYTES = 2**24


class Base(BaseModel):
    """The weights that the first delta goes on.

    Attributes:
        name: a Hub id, or a name that piece_ds fetches; None for a local folder.
        revision: of a Hub id: a branch, tag or commit.
        licence: as the base's card names it.
        fingerprint: of all weights; see Delta.base_fingerprint.
        model_fingerprint: of names and shapes.
    """

    name: str | None = None
    revision: str | None = None
    licence: str | None = None
    fingerprint: str | None = None
    model_fingerprint: str | None = None


class Entry(BaseModel):
    """One file: its sha256 in hexadecimal, and its size."""

    sha256: str
    bytes: Count


class Manifest(BaseModel):
    """The content of piece_ds_deltas.json. Paths are relative, with forward slashes; deltas are in order."""

    format: Literal["piece-deltas"] = "piece-deltas"
    version: Literal[1] = 1
    base: Base
    deltas: list[str]
    files: dict[str, Entry]

    def to_bytes(self) -> bytes:
        """Return the manifest as the bytes of a JSON file."""
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()


@dataclass(frozen=True)
class Published:
    """Deltas that are about to be published.

    Attributes:
        deltas: path in the repository -> opened delta, in order.
        files: path in the repository -> where the file is now, for deltas and masks.
        base: what the deltas go on.
    """

    deltas: Mapping[str, Delta]
    files: Mapping[str, Path]
    base: Base

    def manifest(self, figures: Mapping[str, bytes]) -> Manifest:
        """Return the manifest of these files and of figures. Cost: reads every file once."""
        entries = {name: _entry(path) for name, path in self.files.items()}
        drawn = {name: Entry(sha256=hashlib.sha256(png).hexdigest(), bytes=len(png)) for name, png in figures.items()}
        return Manifest(base=self.base, deltas=list(self.deltas), files=entries | drawn)


def collect(source: Path, base: Base, with_masks: bool, with_statistics: bool = False) -> Published:
    """Return the deltas of a run, of a task or of a file, checked, under the names that they get in a repository.

    Args:
        source: a run's folder, a task's folder, or a delta file.
        base: what is known of it. Fingerprints are filled in from the deltas.
        with_masks: take the mask.safetensors beside each delta too.
        with_statistics: take the run's statistics of general text too.
    Raises:
        UserError: no delta, a damaged file, deltas that do not follow on each other, or a missing mask or statistics.
    """
    paths = find_deltas([source])
    deltas, files = {}, {}
    for path in paths:
        folder = "" if len(paths) == 1 and not _is_run(source, path) else f"{_plain_name(path.parent.name)}/"
        if f"{folder}{DELTA_NAME}" in deltas:
            raise UserError(f"{path.parent} and another task of {source} would both be named {folder}: rename one")
        if not is_own_path(f"{folder}{DELTA_NAME}"):
            raise UserError(f"{path.parent}: expected a task's folder named as 00-law is, with plain digits; rename it")
        deltas[f"{folder}{DELTA_NAME}"] = open_delta(path)
        files[f"{folder}{DELTA_NAME}"] = path
        if with_masks:
            files[f"{folder}{MASK_NAME}"] = _mask_of(path)
    if with_statistics:
        files |= _statistics_of(source)
    require_chain(deltas)
    first = next(iter(deltas.values()))
    fingerprints = {
        "fingerprint": first.base_fingerprint,
        "model_fingerprint": first.metadata.get("model_fingerprint"),
    }
    return Published(deltas, files, base.model_copy(update=fingerprints))


def require_chain(deltas: Mapping[str, Delta]) -> None:
    """Raise UserError unless all deltas are of one model, each starting from what the one before it left."""
    before: tuple[str, Delta] | None = None
    for name, delta in deltas.items():
        if before is not None:
            last, left = before
            if delta.metadata.get("model_fingerprint") != left.metadata.get("model_fingerprint"):
                raise UserError(f"{printable(name)} is of another model than {printable(last)}: publish them apart")
            ends = (left.result_fingerprint, delta.base_fingerprint)
            if None not in ends and ends[0] != ends[1]:
                raise UserError(
                    f"{printable(name)} starts from weights {ends[1]}, but {printable(last)} ends at {ends[0]}: a "
                    "task is missing, repeated or of another run"
                )
        before = name, delta


def read_manifest(path: Path, origin: str) -> Manifest:
    """Return the manifest in a file that was fetched.

    Args:
        path: of the file.
        origin: where it came from, for messages.
    Raises:
        UserError: it is no manifest, or names paths that no manifest has.
    """
    remedy = f"{origin} was not written by piece_ds delta push, or by a newer version"
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise UserError(f"{MANIFEST_NAME} has {path.stat().st_size} bytes: {remedy}")
    manifest = read_json(path, Manifest, MANIFEST_NAME, remedy)
    for name in (*manifest.deltas, *manifest.files):
        if not is_own_path(name):
            raise UserError(f"{MANIFEST_NAME} of {origin} names the file {name[:200]!r}, which cannot be: {remedy}")
    missing = [name for name in manifest.deltas if name not in manifest.files or not name.endswith(DELTA_NAME)]
    if not manifest.deltas or missing or len(set(manifest.deltas)) < len(manifest.deltas):
        raise UserError(f"{MANIFEST_NAME} of {origin} does not list its deltas and their sha256: {remedy}")
    # A task whose delta is not in the list would be left out without a word.
    folders = {name.rpartition("/")[0] for name in manifest.deltas}
    beside = [name for name in manifest.files if _ARTIFACT.fullmatch(name) and name not in manifest.deltas]
    left_out = [name for name in beside if name.endswith(DELTA_NAME) or name.rpartition("/")[0] not in folders]
    if left_out:
        raise UserError(f"{MANIFEST_NAME} of {origin} lists the file {left_out[0]!r}, and not its delta: {remedy}")
    return manifest


def is_own_path(name: str) -> bool:
    """Return whether a manifest may name this path: a delta, a mask, statistics or a figure in its place."""
    known = _ARTIFACT.fullmatch(name) or _FIGURE.fullmatch(name) or _STATISTICS.fullmatch(name)
    return known is not None and printable(name) == name


def require_as_promised(folder: Path, manifest: Manifest, origin: str) -> list[Delta]:
    """Return the deltas in a folder, in order, after comparing every file and the base with the manifest.

    Raises:
        UserError: a file or the base is not what the manifest says; the message names it.
    Cost: reads every file twice.
    """
    for name, promised in manifest.files.items():
        found = _entry(folder / name)
        if found != promised:
            raise UserError(
                f"{name} of {origin} is not what its manifest says: {found.bytes} bytes with the sha256 "
                f"{found.sha256[:12]}..., expected {promised.bytes} with {promised.sha256[:12]}...; nothing was kept"
            )
    deltas = {name: open_delta(folder / name) for name in manifest.deltas}
    first, base = deltas[manifest.deltas[0]], manifest.base
    ends = (first.base_fingerprint, first.metadata.get("model_fingerprint"))
    if ends != (base.fingerprint, base.model_fingerprint):
        raise UserError(
            f"{manifest.deltas[0]} of {origin} goes on the weights {ends[0]}, its manifest says {base.fingerprint}: "
            "the deltas are not of the base that the repository names; nothing was kept"
        )
    require_chain(deltas)
    return list(deltas.values())


def _entry(path: Path) -> Entry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(sha256=digest, bytes=path.stat().st_size)


def _is_run(source: Path, delta: Path) -> bool:
    """Return whether the delta is that of a task of a run's folder, rather than named itself."""
    return source.is_dir() and delta.parent != source


def _plain_name(name: str) -> str:
    """Return the name of a task's folder with only letters, digits, dots, dashes and underscores."""
    return _NOT_IN_NAMES.sub("-", name)[:180]


def _statistics_of(run: Path) -> dict[str, Path]:
    """Return the files of a run's statistics of general text, under the names that they get in a repository."""
    folder = run / STATISTICS_FOLDER
    if not has_statistics(folder):
        raise UserError(f"--with_general_statistics: there are none in {folder}; leave the flag out")
    named = {f"{STATISTICS_FOLDER}/{path.name}": path for path in sorted(folder.iterdir())}
    return {name: path for name, path in named.items() if is_own_path(name)}


def _mask_of(delta: Path) -> Path:
    mask = delta.parent / MASK_NAME
    if delta.name != DELTA_NAME or not mask.is_file():
        raise UserError(f"--with_masks: there is no {MASK_NAME} of {delta}; leave the flag out")
    with open_artifact(mask, MASK):
        return mask
