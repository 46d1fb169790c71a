"""Open a data file, or a data set of the Hub, as checked rows."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from piece_ds.data.formats import RowFormat, checked_rows, format_of, renamed_row
from piece_ds.data.readers import READERS, ROWS_PER_BATCH, read_rows
from piece_ds.data.rows import features_of
from piece_ds.runtime.errors import UserError, nearest

Columns = dict[str, str] | None

_NUM_NAMED = 3  # files of a folder that a refusal names

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w\[\]%:+]+))?")


@dataclass(frozen=True)
class Source:
    """A data file or a data set of the Hub, of which only the first row has been read.

    Attributes:
        name: path, or name on the Hub.
        format: how the first row is written.
        features: columns of checked rows.
        num_bytes: of the file; None if the Hub does not say.
        read: yields all rows, each checked; see formats.checked_rows().
        digest: returns a hash of the content.
    """

    name: str
    format: RowFormat
    features: datasets.Features
    num_bytes: int | None
    read: Callable[[], Iterator[dict[str, Any]]]
    digest: Callable[[], str]


@dataclass(frozen=True)
class DataFile:
    """A data file that has been read.

    Attributes:
        rows: checked rows in the file's order, with the columns of their kind.
        format: how the file writes its rows.
    """

    rows: datasets.Dataset
    format: RowFormat


def load_rows(path_or_name: str, images: bool = False, columns: Columns = None) -> datasets.Dataset:
    """Return the rows of a data file or a Hub data set, in memory; see open_source()."""
    return read_data_file(path_or_name, images, columns).rows


def read_data_file(path_or_name: str, images: bool = False, columns: Columns = None) -> DataFile:
    """Return the rows and the format of a data file or a Hub data set, in memory; see open_source()."""
    source = open_source(path_or_name, images, columns)
    return DataFile(in_memory(source.read(), source.features), source.format)


def open_source(path_or_name: str, images: bool = False, columns: Columns = None) -> Source:
    """Open a JSON, JSONL, CSV or Parquet file, or a Hub data set. Its rows are read one after another.

    Args:
        path_or_name: a file, or NAME or NAME:SPLIT of the Hub. The split is train unless given; offline, the Hub's
            cache serves.
        images: keep the columns of a pair that only a model that reads images needs.
        columns: name in the file -> known name; see formats.parse_columns().
    Returns:
        The source. Rows have the columns of their kind (rows.FEATURES). With images, pairs also have answers (a list)
        and image (a path or None). Other columns are dropped.
    Raises:
        UserError: something cannot be read or used; the message names the file and the line or row. What is wrong with
            a later row is raised by read().
    """
    path = Path(path_or_name)
    if _is_hub_name(path_or_name, path):
        return _from_hub(path_or_name, images, columns)
    _check_file(path)
    # The first row decides the columns of the whole file.
    form = first_format(path, columns)
    return Source(
        name=path_or_name,
        format=form,
        features=features_of(form.kind, images),
        num_bytes=path.stat().st_size,
        read=lambda: checked_rows(read_rows(path), str(path), images, columns),
        digest=lambda: _digest_of_file(path),
    )


def first_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Return the first limit rows; all rows if there are fewer or limit is None."""
    return rows if limit is None or len(rows) <= limit else rows.select(range(limit))


def _is_hub_name(name: str, path: Path) -> bool:
    """Return whether name means a Hub data set: no existing path, no data suffix, and at most one slash."""
    looks_local = path.exists() or path.suffix.lower() in READERS or name.startswith((".", "/", "~"))
    return not looks_local and HUB_NAME.fullmatch(name) is not None


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in READERS)[:_NUM_NAMED]
        hint = f"; it has {', '.join(inside)} (several files: with commas between them)" if inside else ""
        raise UserError(f"{path} is a folder; expected a file: {', '.join(READERS)}{hint}")
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{path}: no such file, and no folder {folder}")
        raise UserError(f"{path}: no such file.{nearest(path.name, sorted(entry.name for entry in folder.iterdir()))}")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; expected rows of prompt and answer")


def first_format(path: Path, columns: Columns) -> RowFormat:
    """Return the format of a file's first row. Raise UserError if the file has no rows."""
    for row in read_rows(path):
        return format_of(renamed_row(row, columns or {}, f"{path} row 1"), f"{path} row 1")
    raise UserError(f"{path} has no rows; expected rows of prompt and answer")


def in_memory(rows: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Return rows as one Arrow table in this process's memory, built a batch at a time."""
    schema = features.arrow_schema
    batches, pending = [], []
    for row in rows:
        pending.append(row)
        if len(pending) == ROWS_PER_BATCH:
            batches.append(pyarrow.RecordBatch.from_pylist(pending, schema=schema))
            pending = []
    batches.append(pyarrow.RecordBatch.from_pylist(pending, schema=schema))
    return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=schema))


def _digest_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes and of its suffix, which chooses the reader."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()} {path.suffix.lower()}"


def _from_hub(name: str, images: bool, columns: Columns) -> Source:
    match = HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        rows = datasets.load_dataset(match["name"], split=match["split"] or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{name}: neither a file here nor a data set the Hub (or its cache) gives: {reason}") from None
    if len(rows) == 0:
        raise UserError(f"{name} has no rows; expected rows of prompt and answer")
    form = format_of(renamed_row(rows[0], columns or {}, f"{name} row 1"), f"{name} row 1")
    return Source(
        name=name,
        format=form,
        features=features_of(form.kind, images),
        num_bytes=rows.dataset_size,
        read=lambda: checked_rows(rows, name, images, columns),
        digest=lambda: f"{name} {rows._fingerprint}",
    )
