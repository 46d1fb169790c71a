"""How long encoded rows are, and their largest ids, read a batch at a time: no row becomes a Python object."""

from collections.abc import Iterator

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute

_ROWS_AT_A_TIME = 10_000


def lengths_of(rows: datasets.Dataset) -> npt.NDArray[np.int64]:
    """Return the number of tokens of each encoded row, in the order of rows. Cost: 8 bytes a row; no token is read."""
    lengths = [pyarrow.compute.list_value_length(column).to_numpy() for column in _columns(rows, "input_ids")]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


def largest_of(rows: datasets.Dataset, column: str) -> int | None:
    """Return the largest id in a column of encoded rows; None if they hold none."""
    found = [pyarrow.compute.max(pyarrow.compute.list_flatten(part)).as_py() for part in _columns(rows, column)]
    return max((largest for largest in found if largest is not None), default=None)


def _columns(rows: datasets.Dataset, name: str) -> Iterator[pyarrow.Array]:
    """Yield a column of rows, batch by batch. Rows that were selected from others are those that were selected."""
    for table in rows.select_columns(name).with_format("arrow").iter(_ROWS_AT_A_TIME):
        yield from table.column(name).chunks
