"""A data file's checked rows and their token ids, made a batch at a time: no whole file as Python objects."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

from piece_ds.data.files import Source
from piece_ds.data.formats import RowFormat
from piece_ds.data.held_out import Indices
from piece_ds.data.readers import ROWS_PER_BATCH
from piece_ds.data.rows import TEXT, TOKENS
from piece_ds.data.tokenize import ENCODED, Encoder, row_encoder

ROW_OF = "row_of"  # column of a file's encoded rows: the number of the row that each comes from
ENCODED_OF_FILE = datasets.Features({**ENCODED, ROW_OF: datasets.Value("int32")})

Batches = tuple[pyarrow.RecordBatch, pyarrow.RecordBatch]


@dataclass(frozen=True)
class EncodedFile:
    """A data file as rows and as token ids.

    Attributes:
        rows: checked, with the columns of their kind.
        encoded: columns input_ids and labels (rows with images have more), in the order of rows.
        format: how the file writes its rows.
        row_of: the row that each encoded row comes from; None if they are one to one. Plain text may become several.
        kept_in: folder of the cache that an earlier run had filled; None if the file was tokenized now.
    """

    rows: datasets.Dataset
    encoded: datasets.Dataset
    format: RowFormat
    row_of: Indices | None = None
    kept_in: Path | None = None

    def select(self, numbers: Indices) -> "EncodedFile":
        """Return only the rows of these numbers, from 0 and ascending, with what they were encoded to."""
        chosen = numbers if self.row_of is None else np.flatnonzero(np.isin(self.row_of, numbers))
        row_of = None if self.row_of is None else np.searchsorted(numbers, self.row_of[chosen])
        return replace(self, rows=self.rows.select(numbers), encoded=self.encoded.select(chosen), row_of=row_of)


def encoded_batches(
    rows: Iterable[dict[str, Any]], features: datasets.Features, encoder: Encoder, source: str
) -> Iterator[Batches]:
    """Yield rows, and what they are encoded to, as Arrow batches of the columns of features and ENCODED_OF_FILE.

    Args:
        rows: checked.
        features: their columns.
        encoder: turns texts into token ids.
        source: file or data set, for messages.
    Raises:
        UserError: a row without an answer token; the message names source and row.
    Cost: ROWS_PER_BATCH rows are held as Python objects.
    """
    encode = row_encoder(features, encoder, documents=True)
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, ROWS_PER_BATCH)):
        encoded = [
            {**found, ROW_OF: number} for number, row in chunk for found in encode(row, f"{source} row {number + 1}")
        ]
        yield (
            pyarrow.RecordBatch.from_pylist([row for _, row in chunk], schema=features.arrow_schema),
            pyarrow.RecordBatch.from_pylist(encoded, schema=ENCODED_OF_FILE.arrow_schema),
        )


def encode_in_memory(source: Source, encoder: Encoder, limit: int | None) -> EncodedFile:
    """Return a source's rows, at most limit of them, and their token ids, in this process's memory."""
    batches = list(encoded_batches(islice(source.read(), limit), source.features, encoder, source.name))
    features = (source.features, ENCODED_OF_FILE)
    tables = [
        pyarrow.Table.from_batches([pair[side] for pair in batches], schema=features[side].arrow_schema)
        for side in (0, 1)
    ]
    return joined(source.format, datasets.Dataset(tables[0]), datasets.Dataset(tables[1]))


def joined(
    form: RowFormat, rows: datasets.Dataset, encoded: datasets.Dataset, kept_in: Path | None = None
) -> EncodedFile:
    """Return rows and encoded rows of ENCODED_OF_FILE as one file. Nothing is copied but the rows' numbers of text."""
    row_of = np.asarray(encoded.data.column(ROW_OF), dtype=np.int64) if form.kind == TEXT else None
    tokens = encoded.remove_columns(ROW_OF)
    return EncodedFile(tokens if form.kind == TOKENS else rows, tokens, form, row_of, kept_in)
