"""results/runs.csv: one row for each finished run, written whole after each."""

import csv
import io
from pathlib import Path

from piece_ds.runtime.files import write_text

COLUMNS = ("name", "task", "rate", "seed")
Record = dict[str, str]


def read_runs(path: Path) -> list[Record]:
    """Return all rows; none if the file is not there."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_run(path: Path, record: Record) -> None:
    """Add a row; it replaces one of the same setting."""
    key = [record[name] for name in COLUMNS]
    runs = [run for run in read_runs(path) if [run[name] for name in COLUMNS] != key] + [record]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for run in runs for column in run)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
