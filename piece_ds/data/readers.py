"""Read data files as rows of plain Python values. Each format has one reader, and errors name the line.

The readers of the datasets library guess types: "11" in a CSV becomes a number, "NA" a missing value. They also report
a malformed line without its number. So files are read here and handed to datasets as typed rows.
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
    """Yield the items of the JSON list in text. Items are decoded one at a time, so only the text is held whole.

    Args:
        text: all of the file.
        path: of the file, for messages.
    Raises:
        UserError: text is not one JSON list; the message names the line.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once_each)

    # An empty file is an empty list; anything else must begin a list.
    index = _skip_space(text, 0)
    if index == len(text):
        return
    if text[index] != "[":
        raise _malformed(path, text, index, "expected a list of rows")
    index = _skip_space(text, index + 1)

    # One item, then a comma or the end. No comma may come before the end.
    while text[index : index + 1] != "]":
        try:
            item, index = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise _malformed(path, text, error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _malformed(path, text, index, _reason(error)) from None
        yield item
        index = _skip_space(text, index)
        if text[index : index + 1] == ",":
            index = _skip_space(text, index + 1)
            if text[index : index + 1] == "]":
                raise _malformed(path, text, index, "comma before the end of the list")
        elif text[index : index + 1] != "]":
            raise _malformed(path, text, index, "expected , or ] after a row")

    # Nothing may follow the list.
    if _skip_space(text, index + 1) != len(text):
        raise _malformed(path, text, _skip_space(text, index + 1), "text after the list")


def _skip_space(text: str, index: int) -> int:
    """Return the index of the first character, from index, that is not JSON white space; or the length of text."""
    while index < len(text) and text[index] in WHITESPACE:
        index += 1
    return index


def _malformed(path: Path, text: str, index: int, reason: str) -> UserError:
    """Return the error for text[index], with its line number."""
    return UserError(f"{path} line {text.count(chr(10), 0, index) + 1}: malformed JSON ({reason}); fix the file")


ROWS_PER_BATCH = 1000  # rows held as Python objects at once while a Parquet file is read


# What files that are no UTF-8 often are, by their first bytes.
_OTHER_CONTENT = {
    b"\xff\xfe": "UTF-16; re-encode the file",
    b"\xfe\xff": "UTF-16; re-encode the file",
    b"\x1f\x8b": "a file that gzip has packed; unpack it",
}


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of path in file order, as the file writes them. Nothing is checked except that the format parses.

    Args:
        path: an existing file of one of the kinds of READERS. Text is UTF-8, with or without a byte order mark.
    Raises:
        UserError: the text is not UTF-8, or a line does not parse; the message names the line.
    """
    try:
        # Text is decoded while it is read, so the error can come from any row.
        yield from READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            head = file.read(2)
        if head in _OTHER_CONTENT:
            raise UserError(f"{path}: expected UTF-8 text, got {_OTHER_CONTENT[head]}") from None
        line = _first_undecodable_line(path)
        raise UserError(f"{path} line {line}: expected UTF-8 text ({error.reason}); re-encode the file") from None


def read_json(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list, or the lines of JSON lines (if the file begins with an object)."""
    with _open_text(path) as file:
        head = file.read(4096).lstrip(WHITESPACE)
        # Many files of JSON lines are named .json.
        if head.startswith("{"):
            file.seek(0)
            row = _one_object(file)
            yield from read_jsonl(path) if row is None else [row]
            return
        file.seek(0)
        text = file.read()
    yield from list_items(text, path)


def _one_object(file: TextIO) -> dict[str, Any] | None:
    """Return a file's only object if it is written over several lines, as indented JSON is, else None."""
    first = next(line for line in file if line.strip(WHITESPACE))
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        try:
            return dict(json.loads(first + file.read(), object_pairs_hook=_once_each))
        except (ValueError, RecursionError):
            return None
    return None


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield one JSON value per line. Blank lines are skipped."""
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip(WHITESPACE):
                try:
                    yield json.loads(line.strip(WHITESPACE), object_pairs_hook=_once_each)
                except (ValueError, RecursionError) as error:
                    if isinstance(error, json.JSONDecodeError) and error.pos >= len(line.strip(WHITESPACE)):
                        raise UserError(
                            f"{path} line {number}: malformed JSON (it does not end on its line); write one row a "
                            "line, or one list of rows in [ ]"
                        ) from None
                    reason = _reason(error)
                    raise UserError(
                        f"{path} line {number}: malformed JSON ({reason}); fix or remove the line"
                    ) from None


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows under a header. Every cell is text, exactly as written. Tabs split those of .tsv, commas others."""
    is_tsv = path.suffix.lower() == ".tsv"
    splitter = "tabs" if is_tsv else "commas"
    with _open_text(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if is_tsv else ",", strict=True)
        try:
            header = [name.strip() for name in reader.fieldnames or []]
            if len(header) == 1 and not is_tsv and (";" in header[0] or "\t" in header[0]):
                raise UserError(
                    f"{path}: expected cells split by commas, got the header {header[0]!r}, which names one column: "
                    "split them by commas, or by tabs in a file named .tsv"
                )
            # A dict would keep only the last of two columns of one name.
            repeated = _first_repeated(header)
            if repeated is not None:
                raise UserError(f"{path}: the CSV header names {repeated!r} twice; name each column once")
            reader.fieldnames = header
            for row in reader:
                if None in row:
                    raise UserError(f"{path} line {reader.line_num}: more cells than the header's {len(header)}")
                yield row
        except csv.Error as error:
            line = reader.line_num + 1  # it counts the lines that were read well
            raise UserError(f"{path} line {line}: malformed CSV ({error}); quote cells that hold {splitter}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, with one batch in memory at a time."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_distinct(file.schema_arrow, path)
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
                yield from batch.to_pylist()
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason[:200]})") from None


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def _open_text(path: Path) -> TextIO:
    """Open text with its line ends kept: a row may hold a carriage return or U+2028; only \\n ends a JSON line."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long transcript
    return path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() in (".csv", ".tsv") else "\n")


def _first_undecodable_line(path: Path) -> int:
    """Return the number of the first line of path that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise ValueError(f"{path} is UTF-8")


def _reason(error: Exception) -> str:
    """Return what is wrong inside a row, with the column if the decoder knows it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Python refuses to read whole numbers of more than a few thousand digits.
    return str(error) if isinstance(error, _RepeatedKeyError) else "a number with too many digits"


class _RepeatedKeyError(ValueError):
    """A JSON object that has a key twice."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raise _RepeatedKeyError if a key stands in it twice.

    Python's own decoder would silently keep only the last of two equal keys.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(f"the key {_first_repeated([key for key, _ in pairs])!r} stands twice in an object")
    return found


def _first_repeated(names: list[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _require_distinct(schema: Any, path: Path) -> None:
    """Raise UserError if a Parquet schema, or a struct in it, names a column twice."""
    names = [field.name for field in schema]
    repeated = _first_repeated(names)
    if repeated is not None:
        raise UserError(f"{path}: the column {repeated!r} stands twice; name each column once")
    for field in schema:
        kind = field.type
        while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        if pyarrow.types.is_struct(kind):
            _require_distinct([kind.field(index) for index in range(kind.num_fields)], path)
