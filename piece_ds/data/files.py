"""A data file, or a data set of the Hub, as a datasets.Dataset of checked rows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from piece_ds.data.readers import READERS, ROWS_PER_BATCH, read_rows
from piece_ds.data.rows import checked_rows, features_of, row_kind
from piece_ds.runtime.errors import UserError, nearest

# Up to this size each rank holds the rows in memory and touches no cache. Larger files go through the datasets
# library's cache on disk, which its file locks keep safe between ranks, and are memory-mapped by all of them.
IN_MEMORY_BYTES = 2**30
READER_VERSION = 1  # part of the cache key: raise it when the readers or the checks change
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w\[\]%:+]+))?")


def load_rows(path_or_name: str, allow_text: bool = False, images: bool = False) -> datasets.Dataset:
    """The rows of a JSON, JSONL, CSV or Parquet file, or of a Hub data set, every one of them checked.

    Args:
        path_or_name: a file, or NAME or NAME:SPLIT of the Hub (split train unless given; offline from its cache).
        allow_text: accept rows of plain text besides prompt and answer.
        images: keep what only a model that reads images needs of a pair.
    Returns:
        Dataset with columns prompt and answer (text; with images also answers, a list, and image, a path or None), or
        input_ids and labels (int64 lists, used as they are), or text. Rows keep the file's order; other columns are
        dropped.
    Raises:
        UserError: what cannot be read or used, naming the file and the line or row.
    """
    path = Path(path_or_name)
    if _is_hub_name(path_or_name, path):
        return _from_hub(path_or_name, allow_text, images)
    _check_file(path)
    kind = _first_kind(path, allow_text)
    if path.stat().st_size <= IN_MEMORY_BYTES:
        return _in_memory(checked_rows(read_rows(path), str(path), allow_text, images), features_of(kind, images))
    return _through_cache(path, features_of(kind, images), allow_text, images)


def first_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """The first limit rows; all of them where there are fewer or limit is None."""
    return rows if limit is None or len(rows) <= limit else rows.select(range(limit))


def _is_hub_name(name: str, path: Path) -> bool:
    """A Hub name is no existing path, has no data suffix, and at most one slash."""
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


def _first_kind(path: Path, allow_text: bool) -> str:
    for row in read_rows(path):
        return row_kind(row, f"{path} row 1", allow_text)
    raise UserError(f"{path} has no rows; expected rows of prompt and answer")


def _in_memory(rows: Iterator[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """rows as one Arrow table in this process's memory, built a batch at a time."""
    schema = features.arrow_schema
    batches, pending = [], []
    for row in rows:
        pending.append(row)
        if len(pending) == ROWS_PER_BATCH:
            batches.append(pyarrow.RecordBatch.from_pylist(pending, schema=schema))
            pending = []
    batches.append(pyarrow.RecordBatch.from_pylist(pending, schema=schema))
    return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=schema))


def _through_cache(path: Path, features: datasets.Features, allow_text: bool, images: bool) -> datasets.Dataset:
    """rows through the datasets library's disk cache, keyed by the file's place, size and time of change."""
    status = path.stat()
    key = {
        "path": str(path.resolve()),
        "allow_text": allow_text,
        "images": images,
        "version": (READER_VERSION, status.st_size, status.st_mtime_ns),
    }
    try:
        return datasets.Dataset.from_generator(_cached_rows, features=features, gen_kwargs=key)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _cached_rows(path: str, allow_text: bool, images: bool, version: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    yield from checked_rows(read_rows(Path(path)), path, allow_text, images)


def _from_hub(name: str, allow_text: bool, images: bool) -> datasets.Dataset:
    match = HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        rows = datasets.load_dataset(match["name"], split=match["split"] or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{name}: neither a file here nor a data set the Hub (or its cache) gives: {reason}") from None
    if len(rows) == 0:
        raise UserError(f"{name} has no rows; expected rows of prompt and answer")
    kind = row_kind(rows[0], f"{name} row 1", allow_text)
    features = features_of(kind, images)
    if rows.dataset_size is None or rows.dataset_size <= IN_MEMORY_BYTES or not set(features) <= set(rows.column_names):
        return _in_memory(checked_rows(rows, name, allow_text, images), features)
    for _ in checked_rows(rows, name, allow_text, images):
        pass
    return rows.select_columns(list(features)).cast(features)
