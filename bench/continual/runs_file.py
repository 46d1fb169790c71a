"""runs.csv: one row for each finished run, and which runs are still to be made."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from bench.continual.grid import Setting
from piece_ds.runtime.files import write_text

Record = dict[str, str]
KEY = ("method", "ratio", "rate", "seed")


def read_runs(path: Path) -> list[Record]:
    """All rows; none where the file is not there."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_run(path: Path, record: Record) -> None:
    """Put record into the file, which is written whole; it replaces one of the same setting (of another recipe)."""
    runs = [run for run in read_runs(path) if _key(run) != _key(record)] + [record]
    columns = list(dict.fromkeys(column for run in runs for column in run))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    write_text(path, text.getvalue())


def not_done(settings: Iterable[Setting], runs: list[Record], recipe: str) -> list[Setting]:
    """The settings without a row of this recipe, in their order."""
    done = {_key(run) for run in runs if run["recipe"] == recipe}
    return [setting for setting in settings if setting.key not in done]


def _key(run: Record) -> tuple[str, ...]:
    return tuple(run[name] for name in KEY)
