"""Data files as rows of plain Python values, one reader a format, each naming the line that cannot be read.

The datasets library's own readers guess types (CSV "11" becomes a number, "NA" a missing value) and report a
malformed line without its number, so files are read here and handed to datasets as typed rows.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from piece_ds.runtime.errors import UserError

WHITESPACE = " \t\r\n"


def list_items(text: str, path: Path) -> Iterator[Any]:
    """Items of the JSON list in text, decoded one at a time so that only the text itself is held whole."""
    decoder = json.JSONDecoder()
    index = _skip_space(text, 0)
    if index == len(text):
        return
    if text[index] != "[":
        raise _malformed(path, text, index, "expected a list of rows")
    index = _skip_space(text, index + 1)
    while text[index : index + 1] != "]":
        try:
            item, index = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise _malformed(path, text, error.pos, error.msg) from None
        except RecursionError:
            raise _malformed(path, text, index, "nested too deeply") from None
        yield item
        index = _skip_space(text, index)
        if text[index : index + 1] == ",":
            index = _skip_space(text, index + 1)
            if text[index : index + 1] == "]":
                raise _malformed(path, text, index, "comma before the end of the list")
        elif text[index : index + 1] != "]":
            raise _malformed(path, text, index, "expected , or ] after a row")
    if _skip_space(text, index + 1) != len(text):
        raise _malformed(path, text, _skip_space(text, index + 1), "text after the list")


def _skip_space(text: str, index: int) -> int:
    """Index of the first character from index on that is not JSON white space, or the length of text."""
    while index < len(text) and text[index] in WHITESPACE:
        index += 1
    return index


def _malformed(path: Path, text: str, index: int, reason: str) -> UserError:
    """The error for text[index], with its line number."""
    return UserError(f"{path} line {text.count(chr(10), 0, index) + 1}: malformed JSON ({reason}); fix the file")


ROWS_PER_BATCH = 1000  # rows held as Python objects at once while a Parquet file is read


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of path in file order, as the file spells them: nothing is checked except that the format parses.

    Args:
        path: an existing .json, .jsonl, .csv or .parquet file; text is UTF-8, with or without a byte order mark.
    Raises:
        UserError: unknown suffix, text that is not UTF-8, or a line that does not parse (with its number).
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        line = _first_undecodable_line(path)
        raise UserError(f"{path} line {line}: expected UTF-8 text ({error.reason}); re-encode the file") from None


def read_json(path: Path) -> Iterator[Any]:
    """A JSON list, or rows one after another when the file starts with an object (JSON lines named .json)."""
    with _open_text(path) as file:
        head = file.read(4096).lstrip(WHITESPACE)
        if head.startswith("{"):
            yield from read_jsonl(path)
            return
        file.seek(0)
        text = file.read()
    yield from list_items(text, path)


def read_jsonl(path: Path) -> Iterator[Any]:
    """One JSON value a line; blank lines are skipped."""
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip(WHITESPACE):
                try:
                    yield json.loads(line.strip(WHITESPACE))
                except (json.JSONDecodeError, RecursionError) as error:
                    reason = _reason(error)
                    raise UserError(
                        f"{path} line {number}: malformed JSON ({reason}); fix or remove the line"
                    ) from None


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows under a header that has prompt and answer; every cell is text, exactly as written."""
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = [name.strip() for name in reader.fieldnames or []]
            missing = [key for key in ("prompt", "answer") if key not in header]
            if header and missing:
                raise UserError(
                    f"{path}: CSV header has no column {' or '.join(map(repr, missing))}, it has {str(header)[:200]}; "
                    "name the columns prompt and answer"
                )
            reader.fieldnames = header
            for row in reader:
                if None in row:
                    raise UserError(f"{path} line {reader.line_num}: more cells than the header's {len(header)}")
                yield row
        except csv.Error as error:
            line = reader.line_num + 1  # it counts the lines that were read well
            raise UserError(f"{path} line {line}: malformed CSV ({error}); quote cells that hold commas") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a batch in memory at a time."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason[:200]})") from None


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _open_text(path: Path) -> TextIO:
    """Text with its line ends kept: a row may hold a carriage return or U+2028, and only \\n ends a JSON line."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long transcript
    return path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else "\n")


def _first_undecodable_line(path: Path) -> int:
    """Number of the first line of path that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise ValueError(f"{path} is UTF-8")


def _reason(error: Exception) -> str:
    """What is wrong inside a line, with the column where the decoder knows it."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
