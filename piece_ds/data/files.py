"""Read a data file, or a data set of the Hub, as a datasets.Dataset of checked rows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from piece_ds.data.formats import RowFormat, checked_rows, format_of, renamed_row
from piece_ds.data.readers import READERS, ROWS_PER_BATCH, read_rows
from piece_ds.data.rows import CHAT, features_of
from piece_ds.runtime.errors import UserError, nearest

# Up to this size, each rank holds the rows in memory and touches no cache. Larger files go through the datasets
# library's disk cache. Its file locks keep the cache safe between ranks, and all ranks map the same files.
IN_MEMORY_BYTES = 2**30
READER_VERSION = 2  # part of the cache key: raise it when the readers or the checks change
Columns = dict[str, str] | None

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w\[\]%:+]+))?")


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
    """Return the rows of a data file or a Hub data set; see read_data_file()."""
    return read_data_file(path_or_name, images, columns).rows


def read_data_file(path_or_name: str, images: bool = False, columns: Columns = None) -> DataFile:
    """Read a JSON, JSONL, CSV or Parquet file, or a Hub data set, and check every row of it.

    Args:
        path_or_name: a file, or NAME or NAME:SPLIT of the Hub. The split is train unless given; offline, the Hub's
            cache serves.
        images: keep the columns of a pair that only a model that reads images needs.
        columns: name in the file -> known name; see formats.parse_columns().
    Returns:
        The rows and their format. Rows have the columns of their kind (rows.FEATURES). With images, pairs also have
        answers (a list) and image (a path or None). Other columns are dropped.
    Raises:
        UserError: something cannot be read or used; the message names the file and the line or row.
    """
    path = Path(path_or_name)
    if _is_hub_name(path_or_name, path):
        return _from_hub(path_or_name, images, columns)
    _check_file(path)
    # The first row decides the columns of the whole file.
    form = first_format(path, columns)
    features = features_of(form.kind, images)
    if path.stat().st_size <= IN_MEMORY_BYTES:
        return DataFile(_in_memory(checked_rows(read_rows(path), str(path), images, columns), features), form)
    return DataFile(_through_cache(path, features, images, columns), form)


def first_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Return the first limit rows; all rows if there are fewer or limit is None."""
    return rows if limit is None or len(rows) <= limit else rows.select(range(limit))


def _is_hub_name(name: str, path: Path) -> bool:
    """Return whether name means a Hub data set: no existing path, no data suffix, and at most one slash."""
    looks_local = path.exists() or path.suffix.lower() in READERS or name.startswith((".", "/", "~"))
    return not looks_local and HUB_NAME.fullmatch(name) is not None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file: {', '.join(READERS)}")
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


def _in_memory(rows: Iterator[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
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


def _through_cache(path: Path, features: datasets.Features, images: bool, columns: Columns) -> datasets.Dataset:
    """Return rows through the datasets library's disk cache. The key is the file's path, size and time of change."""
    status = path.stat()
    key = {
        "path": str(path.resolve()),
        "images": images,
        "columns": columns,
        "version": (READER_VERSION, status.st_size, status.st_mtime_ns),
    }
    try:
        return datasets.Dataset.from_generator(_cached_rows, features=features, gen_kwargs=key)
    except datasets.exceptions.DatasetGenerationError as error:
        # The datasets library wraps our message in its own error.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _cached_rows(path: str, images: bool, columns: Columns, version: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    yield from checked_rows(read_rows(Path(path)), path, images, columns)


def _from_hub(name: str, images: bool, columns: Columns) -> DataFile:
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
    features = features_of(form.kind, images)
    is_small = rows.dataset_size is None or rows.dataset_size <= IN_MEMORY_BYTES
    # Rows that change in any way are converted in memory. Large ones that stay as they are keep the Hub's own files.
    if is_small or columns or form.kind == CHAT or not set(features) <= set(rows.column_names):
        return DataFile(_in_memory(checked_rows(rows, name, images, columns), features), form)
    for _ in checked_rows(rows, name, images):
        pass
    return DataFile(rows.select_columns(list(features)).cast(features), form)
