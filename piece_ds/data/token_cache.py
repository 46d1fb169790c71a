"""Token ids of data files, kept in the user's cache folder: a file is tokenized once, for all ranks and later runs.

    tokenized/KEY/rows.arrow     checked rows
    tokenized/KEY/tokens.arrow   input_ids, labels and the row that they come from
    tokenized/KEY/entry.json     size and sha256 of both

KEY is a hash of all that decides the content: see token_cache_key.py. Both tables are mapped into memory, so that the
ranks of a machine share one copy, and the system may drop pages that nobody reads. The first process that wants an
entry holds its lock and writes it; the others wait. A folder is put in place when it is whole.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pyarrow

from piece_ds.data.encoded_file import ENCODED_OF_FILE, EncodedFile, encode_in_memory, encoded_batches, joined
from piece_ds.data.files import Source
from piece_ds.data.rows import TOKENS
from piece_ds.data.token_cache_key import key_of
from piece_ds.data.tokenize import Encoder
from piece_ds.runtime.cache import CacheRefused, cache_folder, locked
from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.runtime.files import write_folder, write_json
from piece_ds.runtime.schema import read_json

logger = logging.getLogger(__name__)

# Smaller files take about a second to tokenize: they are not worth a folder.
MIN_BYTES = 2**20
ROWS_NAME, TOKENS_NAME, ENTRY_NAME = "rows.arrow", "tokens.arrow", "entry.json"


@dataclass(frozen=True)
class Entry:
    """What entry.json says: the format of the folder, and file name -> size in bytes and sha256."""

    format: str
    version: int
    files: dict[str, list[int | str]]


def encode_once(
    source: Source, encoder: Encoder, *, limit: int | None, columns: dict[str, str], use_cache: bool
) -> EncodedFile:
    """Return a source's rows and token ids, from the cache if they are there; else keep them there.

    Args:
        source: a file or a data set of the Hub.
        encoder: turns texts into token ids.
        limit: only the first rows; None means all.
        columns: as in files.open_source().
        use_cache: read and write the cache. Without it, or if the source is smaller than MIN_BYTES, everything is in
            this process's memory.
    Raises:
        UserError: a row cannot be used, or the file changed while it was read.
    """
    is_large = source.num_bytes is None or source.num_bytes >= MIN_BYTES
    digest = source.digest() if use_cache and is_large else ""
    key = key_of(source, digest, encoder, limit=limit, columns=columns) if digest else None
    if key is None:
        return encode_in_memory(source, encoder, limit)
    folder = cache_folder() / "tokenized" / key
    if (found := _read_whole(folder, source)) is not None:
        return found
    try:
        # Another process may have written it since. What is there now is damaged.
        with locked(folder):
            if (found := _read_whole(folder, source)) is not None:
                return found
            if folder.exists():
                logger.warning("%s is tokenized again: what the cache held in %s is damaged", source.name, folder)
                shutil.rmtree(folder)
            return _write_and_read(folder, source, digest, encoder, limit)
    except (CacheRefused, MachineError) as error:
        logger.warning("%s is tokenized in memory: %s", source.name, error)
        return encode_in_memory(source, encoder, limit)


def _write_and_read(folder: Path, source: Source, digest: str, encoder: Encoder, limit: int | None) -> EncodedFile:
    """Write a folder that is not there, and return what it holds. The caller holds its lock."""
    write_folder(folder, lambda temporary: _write(temporary, source, encoder, limit))
    # A file that changes meanwhile must not be kept under the hash of what it was.
    if source.digest() != digest:
        shutil.rmtree(folder)
        raise UserError(f"{source.name} changed while it was read: run again when it is complete")
    return _read(folder, source, kept_in=None)


def _read_whole(folder: Path, source: Source) -> EncodedFile | None:
    """Return what a folder holds; None if it is not there, or damaged."""
    try:
        return _read(folder, source, kept_in=folder) if folder.exists() else None
    except (UserError, OSError, pyarrow.ArrowException):
        return None


def _write(folder: Path, source: Source, encoder: Encoder, limit: int | None) -> None:
    """Fill a folder with a source's rows and token ids, a batch at a time."""
    rows_schema, tokens_schema = source.features.arrow_schema, ENCODED_OF_FILE.arrow_schema
    with (
        pyarrow.OSFile(str(folder / ROWS_NAME), "wb") as rows_file,
        pyarrow.OSFile(str(folder / TOKENS_NAME), "wb") as tokens_file,
        pyarrow.ipc.new_stream(rows_file, rows_schema) as rows_stream,
        pyarrow.ipc.new_stream(tokens_file, tokens_schema) as tokens_stream,
    ):
        for rows, tokens in encoded_batches(islice(source.read(), limit), source.features, encoder, source.name):
            if source.format.kind != TOKENS:  # else they are the same
                rows_stream.write_batch(rows)
            tokens_stream.write_batch(tokens)
    write_json(folder / ENTRY_NAME, {"format": "piece-tokens", "version": 1, "files": dict(_measured(folder))})


def _read(folder: Path, source: Source, kept_in: Path | None) -> EncodedFile:
    """Return what a folder holds, mapped. Raise UserError, OSError or ArrowException if it is damaged."""
    entry = read_json(folder / ENTRY_NAME, Entry, "entry of the cache", "it is made again")
    if dict(_measured(folder)) != entry.files:
        raise UserError("its files are not what was written")
    rows, tokens = (datasets.Dataset.from_file(str(folder / name)) for name in (ROWS_NAME, TOKENS_NAME))
    return joined(source.format, rows, tokens, kept_in)


def _measured(folder: Path) -> Iterator[tuple[str, list[int | str]]]:
    """Yield the name of each table with its size in bytes and its sha256. Cost: a pass over both, 1 s for 1 GB."""
    for name in (ROWS_NAME, TOKENS_NAME):
        with open(folder / name, "rb") as file:
            yield name, [(folder / name).stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
