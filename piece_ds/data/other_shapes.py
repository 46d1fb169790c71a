"""Say what a file holds whose first object is no row, but all rows: split, by column, or under keys."""

from typing import Any

from piece_ds.runtime.errors import UserError

_SPLITS = ("train", "training", "test", "eval", "validation", "valid", "val", "dev")


def refuse_splits(row: dict[str, Any], where: str) -> None:
    """Raise UserError for an object of a data set's splits, each with rows of its own.

    Args:
        row: the first object of a file.
        where: file and row, for the message.
    """
    splits = {name: value for name, value in row.items() if str(name).lower() in _SPLITS and _is_rows(value)}
    if splits:
        raise UserError(
            f"{where}: it holds a data set's splits ({_sizes(splits)}), not a row; expected the rows of one split in a "
            "file: make a file of each"
        )


def refuse_columns(row: dict[str, Any], where: str) -> None:
    """Raise UserError for an object that has a column of values, instead of one value, under every name.

    Args:
        row, where: as in refuse_splits().
    """
    if not row or not all(_is_column(value) for value in row.values()):
        return

    # Ids and turns are lists in a row as well.
    is_of_ids = all(_has_numbers(value) for value in row.values()) or _has_numbers(row.get("input_ids"))
    is_of_turns = any(name in row and not _has_lists(row[name]) for name in ("messages", "conversations"))
    if not is_of_ids and not is_of_turns:
        raise UserError(
            f"{where}: it holds columns ({_sizes(row)}), not a row; expected an object with one value under each "
            "name for every row: write the table by rows (pandas: to_json(FILE, orient='records'))"
        )


def refuse_keyed_rows(row: dict[str, Any], where: str) -> None:
    """Raise UserError for an object with a row, or a list of rows, under a name of its own.

    Args:
        row, where: as in refuse_splits().
    """
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1 and "role" not in row[lists[0]][0] and "from" not in row[lists[0]][0]:
        raise UserError(
            f"{where}: it holds a list of {len(row[lists[0]])} rows under {lists[0]!r}; expected the rows themselves: "
            "make a file of that list"
        )
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        raise UserError(
            f"{where}: it holds an object under each of {len(row)} names, not a row; expected the rows themselves: "
            "make a file of a list of these objects"
        )


def _is_rows(value: Any) -> bool:
    """Return whether a value may be a split: rows, a table of columns, or nothing yet."""
    is_list = isinstance(value, list) and (not value or isinstance(value[0], dict))
    return is_list or _is_table(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_column(column) for column in value.values())


def _is_column(value: Any) -> bool:
    """Return whether a value is one column of a table: values in a list, or under their numbers (as pandas writes)."""
    if isinstance(value, dict):
        return list(value) == [str(number) for number in range(len(value))] and bool(value)
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _has_numbers(column: Any) -> bool:
    return isinstance(_first(column), int | float)


def _has_lists(column: Any) -> bool:
    return isinstance(_first(column), list)


def _first(column: Any) -> Any:
    """Return the first value of a column, or None of what is none."""
    return next(iter(column.values() if isinstance(column, dict) else column or ()), None)


def _sizes(parts: dict[str, Any]) -> str:
    """Return how many values lie under which name."""
    named = list(parts.items())[:5]
    return ", ".join(f"{len(_first(value) if _is_table(value) else value)} under {name!r}" for name, value in named)
